"""Attempts at a run in pytest's own process, which outlives them: no process has to start for them.

A stop is a real SIGTERM; a crash leaves the last committed checkpoint, as SIGKILL does; a limit is that of the task.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from programs.at_limit import reach_limit
from support import assert_resumed, clean_env, losses, weights

from trainer import SpotRun

Script = Callable[[SpotRun, Callable[[], None]], None]
"""A program; it calls its second argument in each step, which may strike it."""


class Attempts:
    """Runs a program's attempts, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def one(
        self,
        script: Script,
        strike: int = 0,
        kind: str = "stop",
        env: Mapping[str, str] = MappingProxyType({}),
        **options: Any,
    ) -> int:
        """Run an attempt; `strike` is the step in which it is struck. Returns the exit code.

        Args:
            script: The program.
            strike: The step in which it is struck; 0: none.
            kind: "stop"; "crash", once the save under way is decided; or "limit", which it has reached then.
            env: Variables of the attempt.
            options: Those of SpotRun.
        """
        with pytest.MonkeyPatch.context() as patch:
            for name in set(os.environ) - set(clean_env()):
                patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            random.seed(0)
            torch.manual_seed(0)
            try:
                with SpotRun(self.folder, **{"save_every": 3, **options}) as run:
                    script(run, lambda: hit(kind, run) if run.step + 1 == strike else None)
            except SystemExit as left:
                return int(str(left.code))
        return 0

    def all(self, script: Script, strikes: Iterable[int] = (), kind: str = "stop") -> Attempts:
        """Run an attempt for each strike, and one to the end."""
        for strike in strikes:
            assert self.one(script, strike, kind) == (75 if kind == "stop" else 1)
        assert self.one(script) == 0
        assert_resumed(self.folder)
        return self

    @property
    def result(self) -> tuple[dict[int, object], dict[str, bytes]]:
        return losses(self.folder), weights(self.folder)


def hit(kind: str, run: SpotRun) -> None:
    if kind == "crash":
        # On a slow machine the next attempt would begin from the save before.
        loop = run._framework or run._own
        assert loop
        loop._session.saver.wait()
        raise RuntimeError("as planned")
    if kind == "limit":
        reach_limit(run)
    else:
        stop()


def stop() -> None:
    """Send this process the SIGTERM of a stop."""
    os.kill(os.getpid(), signal.SIGTERM)
