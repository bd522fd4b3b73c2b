"""Attempts of one rank within the test's own process: some 50 ms instead of the 2.5 s of a started trainer."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from trainer import RunConfig, SpotRun
from trainer.attempt.ending import FINISHED, Ending
from trainer.attempt.record import StopReason
from trainer.checkpoint.saving import Saver
from trainer.checkpoint.staging import Copy
from trainer.training.session import Session


class Left(BaseException):
    """Raised where the process would have ended, with its exit code."""

    def __init__(self, code: int, cause: str, error: str | None) -> None:
        super().__init__(code, cause, error)
        self.code, self.cause, self.error = code, cause, error


class InProcess(SpotRun):
    """An attempt that ends with an exception, not with the process."""

    def leave(self, ending: Ending, *, code: int | None = None, error: str | None = None, **more: Any) -> NoReturn:
        """Write the end, then raise `Left`."""
        self.write_end(ending, code=code, error=error, **more)
        if self.journal:  # Its thread lives on; it must do nothing more in the run's folder.
            self.journal._progress, self.journal.stop_reason = {}, StopReason(ending, "the attempt has ended")
        raise Left(ending.code if code is None else code, ending.cause, error)

    def _end_with(self, error: BaseException) -> NoReturn:
        if isinstance(error, Left):  # It has left already, at a stop.
            raise error
        super()._end_with(error)

    def _watch_the_bucket(self) -> None:
        """Do nothing: pytest's process outlives the attempt, and a hanging call of another test must not end it."""


class Numbers:
    """Samples that are a pure function of their number; `asked` lists the samples trained on, batch by batch."""

    def __init__(self, count: int = 60, weigh: Callable[[Any], Any] = len) -> None:
        self.count, self.weigh = count, weigh
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return self.count

    def batch(self, ids: np.ndarray) -> torch.Tensor:
        self.asked.append([int(number) for number in ids])
        rows = [np.random.Generator(np.random.PCG64(int(number))).standard_normal(5) for number in ids]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def weight(self, batch: torch.Tensor) -> Any:
        return self.weigh(batch)


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Sum of squared errors; the target is the sum of a row's first four numbers."""
    return (model(batch[:, :4]).squeeze(1) - batch[:, :4].sum(1)).square().sum()


@contextmanager
def attempt(run_dir: Path, binding: dict[str, Any] | None = None, **settings: Any) -> Iterator[InProcess]:
    """Begin an attempt; afterwards, restore this process's signal handlers and environment."""
    config = RunConfig(
        checkpoint_dir=run_dir,
        cpu=True,
        **{"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 6, "save_interval_steps": 2, **settings},
    )
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    env, threads = dict(os.environ), torch.get_num_threads()
    AcceleratorState._reset_state(True)  # Otherwise the previous attempt's precision stays in force.
    try:
        with InProcess(config, binding) as run:
            yield run
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        os.environ.clear()  # accelerate leaves variables in it that would steer processes started later.
        os.environ.update(env)
        torch.set_num_threads(threads)


def pruned_before_the_next_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each save wait until the previous one is read back and older checkpoints are pruned."""
    real = Saver.start

    def start(saver: Saver, collect: Any) -> None:
        saver.wait()
        saver.settle()
        real(saver, collect)

    monkeypatch.setattr(Saver, "start", start)


def copied_late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A copy beside training begins once training waits for it, or once the event is set."""
    go, copy_on, save, await_copied = threading.Event(), Copy.run, Session.save, Session.await_copied

    def late(copied: Copy) -> None:
        go.wait(60)
        copy_on(copied)

    def begun(session: Session, **options: Any) -> None:
        go.clear()
        save(session, **options)

    def awaited(session: Session) -> None:
        go.set()
        await_copied(session)

    monkeypatch.setattr(Copy, "run", late)
    monkeypatch.setattr(Session, "save", begun)
    monkeypatch.setattr(Session, "await_copied", awaited)
    return go


def train(
    run_dir: Path,
    *,
    model: Callable[[], nn.Module] = lambda: nn.Linear(4, 1),
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    samples: Any = None,
    loss: Callable[[nn.Module, Any], torch.Tensor] = squares,
    binding: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    held_out: Any = None,
    before: Callable[[InProcess], None] = lambda run: None,
    **settings: Any,
) -> Left:
    """Run one attempt from its start to its end; returns how it ended."""
    try:
        with attempt(run_dir, binding, **settings) as run:
            before(run)
            torch.manual_seed(0)
            made = model()
            told = {"samples": samples or Numbers(), "held_out": held_out, "extra": extra}
            run.train(made, optimizer(made.parameters()), loss=loss, **told)
    except Left as left:
        return left
    return Left(FINISHED.code, FINISHED.cause, None)  # A finished run goes on after the block.
