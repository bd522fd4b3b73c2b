"""Attempts at a run in the test's own process: no process has to start for them.

A stop is a real SIGTERM; a crash leaves the last committed checkpoint, as SIGKILL does.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from support import losses, weights

from trainer import SpotRun
from trainer.training import participant
from trainer.training.unwinding import Left

Script = Callable[[SpotRun, Callable[[], None]], None]
"""A program; it calls its second argument in each step, which may strike it."""


class Attempts:
    """Runs a program's attempts, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def one(self, script: Script, strike: int = 0, kind: str = "stop", save_every: int = 3) -> int:
        """Run an attempt; `strike` is the step in which it is stopped or crashes. Returns the exit code."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(participant, "unwind", leave)
            patch.setattr(os, "_exit", leave)
            # Its thread would outlive the attempt.
            patch.setattr(SpotRun, "_watch_the_bucket", lambda run: None)
            for name in ("RANK", "WORLD_SIZE", "SKYSPOT_LINK", "SKYSPOT_MOUNT", "SKYSPOT_GRACE_S", "SKYPILOT_TASK_ID"):
                patch.delenv(name, raising=False)
            before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            random.seed(0)
            torch.manual_seed(0)
            try:
                with SpotRun(self.folder, save_every=save_every) as run:
                    script(run, lambda: hit(kind) if run.step + 1 == strike else None)
            except SystemExit as left:
                return int(str(left.code))
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        return 0

    def all(self, script: Script, strikes: Iterable[int] = (), kind: str = "stop") -> Attempts:
        """Run an attempt for each strike, and one to the end."""
        for strike in strikes:
            assert self.one(script, strike, kind) == (75 if kind == "stop" else 1)
        assert self.one(script) == 0
        return self

    @property
    def result(self) -> tuple[dict[int, object], dict[str, bytes]]:
        return losses(self.folder), weights(self.folder)


def leave(code: int, *_: object) -> NoReturn:
    raise Left(code)


def hit(kind: str) -> None:
    if kind == "crash":
        raise RuntimeError("as planned")
    os.kill(os.getpid(), signal.SIGTERM)
