"""Attempts at a run in pytest's own process, which outlives them: no process has to start for them.

A stop is a real SIGTERM; a crash leaves the last committed checkpoint, as SIGKILL does.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_lab import until
from support import assert_resumed, clean_env, losses, weights

from skyspot.rehearsal.watch import is_committed
from trainer import SpotRun
from trainer.layout.names import RunPaths, list_checkpoints

SAVE_EVERY = 3
"""Steps between saves, unless a test says otherwise; none does so for a crash."""
Script = Callable[[SpotRun, Callable[[], None]], None]
"""A program; it calls its second argument in each step, which may strike it."""


class Attempts:
    """Runs a program's attempts, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def one(self, script: Script, strike: int = 0, kind: str = "stop", **options: Any) -> int:
        """Run an attempt; `strike` is the step in which it is stopped or crashes. Returns the exit code.

        Args:
            script: The program.
            strike: The step in which it is struck; 0: none.
            kind: "stop", or "crash": once the last save that was due is committed.
            options: Those of SpotRun.
        """
        with pytest.MonkeyPatch.context() as patch:
            for name in set(os.environ) - set(clean_env()):
                patch.delenv(name)
            random.seed(0)
            torch.manual_seed(0)
            try:
                with SpotRun(self.folder, **{"save_every": SAVE_EVERY, **options}) as run:
                    script(run, lambda: self.strike(kind, run.step) if run.step + 1 == strike else None)
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

    def strike(self, kind: str, done: int) -> None:
        """Stop this process, or crash, after so many steps."""
        if kind == "stop":
            stop()
            return
        # On a slow machine the save may still be under way, and the next attempt would begin from the one before.
        due = done - done % SAVE_EVERY
        until(f"step {due} is committed", lambda: due == 0 or self._committed_step() >= due)
        raise RuntimeError("as planned")

    def _committed_step(self) -> int:
        paths = RunPaths(self.folder)
        return max((one.step for one in list_checkpoints(paths) if is_committed(paths.checkpoint(one))), default=0)

    @property
    def result(self) -> tuple[dict[int, object], dict[str, bytes]]:
        return losses(self.folder), weights(self.folder)


def stop() -> None:
    """Send this process the SIGTERM of a stop."""
    os.kill(os.getpid(), signal.SIGTERM)
