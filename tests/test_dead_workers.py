"""A worker of a data loader that dies once a stop was heard is part of the stop: the last boundary is saved, 75."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import one_rank
import pytest
import torch
from in_process import Attempts, Script, stop
from support import PROGRAMS, event, launch, losses, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from trainer import SpotRun
from trainer.machine import loader_workers
from trainer.machine.flag import Flag
from trainer.training import loading_here

X = torch.randn(18, 3, generator=torch.Generator().manual_seed(1))
ITEMS = TensorDataset(X, X.sum(1, keepdim=True))
"""5 batches."""
DIED = "DataLoader worker (pid(s) 7) exited unexpectedly"


def program(
    accumulate: int = 1, workers: int = 0, between: Callable[[SpotRun], None] = lambda run: None, *, own: bool = False
) -> Script:
    """A loop of one's own; `between` is called after the passes of each batch; `own`: the loader has a generator."""

    def script(run: SpotRun, _: Callable[[], None]) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        run.register(model=model, optimizer=optimizer)
        generator = torch.Generator().manual_seed(4) if own else None
        loader = DataLoader(ITEMS, batch_size=4, shuffle=True, num_workers=workers, generator=generator)
        for x, y in run.steps(loader, until=9, accumulate=accumulate):
            loss = (model(x) - y).square().mean()
            loss.backward()
            between(run)
            if run.ends_step:
                optimizer.step()
                optimizer.zero_grad()
                run.log(loss=loss)
        run.finish()

    return script


@pytest.fixture
def whole(tmp_path: Path) -> Callable[[Script], Any]:
    """What a program's run comes to that nothing stops."""
    return lambda script: Attempts(tmp_path / "whole").all(script).result


def raises_in(patch: pytest.MonkeyPatch, ask: int, is_stopped: bool = True) -> None:
    """Have loaders raise torch's error as they are asked for the N-th time; the end of an epoch is asked for too."""
    given, asks = _SingleProcessDataLoaderIter._next_data, iter(range(1, 1000))

    def next_data(self: Any) -> Any:
        if next(asks) == ask:
            if is_stopped:
                stop()
            raise RuntimeError(DIED)
        return given(self)

    patch.setattr(_SingleProcessDataLoaderIter, "_next_data", next_data)


def test_a_worker_that_is_killed_within_a_step_after_a_stop(tmp_path: Path, whole: Any) -> None:
    def between(run: SpotRun) -> None:
        if run.step + 1 == 4:
            stop()
            assert run.notices.received.wait(60)
            worker = multiprocessing.active_children()[0].pid
            assert worker
            os.kill(worker, signal.SIGKILL)
            os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)

    stopped = Attempts(tmp_path / "run")
    assert stopped.one(program(workers=2, between=between)) == 75
    ended = event(stopped.folder, "end")
    assert (ended["cause"], ended["committed_step"]) == ("signal", 4)
    assert stopped.all(program()).result == whole(program())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "ask", "saved"),
    [
        pytest.param(program(), 7, 5, id="as an epoch begins"),
        pytest.param(program(own=True), 7, 5, id="as an epoch of the loader's own generator begins"),
        pytest.param(program(2), 9, 3, id="within a step"),
        pytest.param(program(), 9, 7, id="within an epoch", marks=pytest.mark.slow),
        pytest.param(program(2), 10, 4, id="after a step", marks=pytest.mark.slow),
    ],
)
def test_a_loader_that_has_no_batch_because_of_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Any, script: Script, ask: int, saved: int
) -> None:
    """The stop is heard once the ranks have agreed that there is none."""
    monkeypatch.setattr("trainer.training.consensus.LONG_S", 0.0)  # So that each boundary is kept.
    stopped = Attempts(tmp_path / "run")
    with monkeypatch.context() as patch:
        raises_in(patch, ask)
        assert stopped.one(script, save_every=100) == 75
    ended = event(stopped.folder, "end")
    assert (ended["cause"], ended["step"], ended["committed_step"]) == ("signal", saved, saved)
    assert stopped.all(script).result == whole(script)
    assert event(stopped.folder, "restored")["lost_steps"] == 0


def test_a_boundary_that_was_not_kept_is_not_saved_and_the_run_goes_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    stopped = Attempts(tmp_path / "run")
    with monkeypatch.context() as patch:
        raises_in(patch, 9)
        assert stopped.one(program(2), save_every=2) == 75
    ended = event(stopped.folder, "end")
    assert (ended["cause"], ended["committed_step"]) == ("signal", 2)
    assert f"RuntimeError: {DIED}. That is part of the stop (sigterm). The last committed step is 2." in (
        capfd.readouterr().out
    )


def test_without_a_stop_it_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader_workers, "PATIENCE_S", 0.0)
    failed = Attempts(tmp_path / "run")
    with monkeypatch.context() as patch:
        raises_in(patch, 3, is_stopped=False)
        assert failed.one(program()) == 1
    assert event(failed.folder, "end")["cause"] == "error"
    assert DIED in capfd.readouterr().err


def test_another_error_after_a_stop_is_an_error(tmp_path: Path) -> None:
    def between(run: SpotRun) -> None:
        stop()
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    assert Attempts(tmp_path / "run").one(program(between=between)) == 1


def test_a_framework_that_raises_it_in_its_own_loop_is_left_with_75(tmp_path: Path) -> None:
    def between(run: SpotRun) -> None:
        if run.step == 4:
            stop()
            raise RuntimeError(DIED)

    stopped = Attempts(tmp_path / "run")
    assert stopped.one(program(between=between), save_every=2) == 75
    assert event(stopped.folder, "end")["cause"] == "signal"


class Fed(one_rank.Numbers):
    """Samples that a data loader feeds, whose worker dies in the step after the third, at a stop."""

    run: one_rank.InProcess | None = None

    def batch(self, ids: np.ndarray) -> torch.Tensor:
        if self.run and self.run.steps_done == 3:
            stop()
            raise RuntimeError(DIED)
        return super().batch(ids)


def test_samples_of_train_that_have_no_batch_because_of_a_stop(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def before(run: one_rank.InProcess) -> None:
        samples.run = run

    samples, run_dir = Fed(), tmp_path / "run"
    stopped = one_rank.train(run_dir, model=model, samples=samples, before=before, save_interval_steps=100)
    assert (stopped.code, stopped.cause) == (75, "signal")
    assert event(run_dir, "end")["committed_step"] == 3
    assert one_rank.train(run_dir, model=model).code == one_rank.train(tmp_path / "whole", model=model).code == 0
    assert losses(run_dir) == losses(tmp_path / "whole")
    assert weights(run_dir) == weights(tmp_path / "whole")


def test_a_stop_may_be_heard_a_moment_after_its_worker_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_workers, "PATIENCE_S", 60.0)
    heard = Flag()
    threading.Timer(0.05, heard.set).start()
    assert loader_workers.died_at_stop(RuntimeError(DIED), heard)
    assert not loader_workers.died_at_stop(ValueError(DIED), heard)


# -- the samples of a worker that has died -----------------------------------------------------------------------------


class Numbered(Dataset[torch.Tensor]):
    """Samples that are their number; those from `needs_worker` on only a worker can load."""

    def __init__(self, needs_worker: int = 100) -> None:
        self.needs_worker = needs_worker

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        assert index < self.needs_worker or get_worker_info()
        torch.rand(1)
        return torch.tensor(index)


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


@pytest.fixture
def is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop was heard."""
    heard = Flag()
    heard.set()
    loading_here.load_here_at_stop(heard)
    loader_workers.outlive_at_stop(heard)
    loader_workers.seed_each_epoch()


def epochs(loader: DataLoader[torch.Tensor], kills_at: int = -1) -> list[list[int]]:
    """What two epochs give, and the next random number; the workers die once so many batches have come."""
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        for batch in loader:
            if len(found) == kills_at:
                kill_workers()
            found.append(batch.tolist())
        if len(found) == kills_at:
            kill_workers()
    return [*found, torch.rand(1).tolist()]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kills_at", [1, 6, 7])
def test_a_loader_goes_on_without_its_workers(is_stopped: None, persistent: bool, kills_at: int) -> None:
    """Within an epoch, between two, and in the second; the program's own random numbers stay the same."""

    def loader() -> DataLoader[torch.Tensor]:
        return DataLoader(Numbered(), batch_size=2, shuffle=True, num_workers=2, persistent_workers=persistent)

    assert epochs(loader(), kills_at) == epochs(loader())


class Stream(IterableDataset[int]):
    """Samples that only the workers can read: each is at its own place."""

    def __iter__(self) -> Any:
        return iter(range(12))


@pytest.mark.parametrize("items", [Numbered(needs_worker=6), Numbered(needs_worker=11), Stream()])
def test_what_only_a_worker_can_load_is_the_workers_death(is_stopped: None, items: Any) -> None:
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        epochs(DataLoader(items, batch_size=2, num_workers=2), kills_at=1)


FRAMEWORKS = {
    "own_loop.py": ("--order", "workers", "--count", 36, "--until", 10),
    "hf.py": ("--workers", 2, "--count", 36, "--until", 10, "--log", 3),
    "lightning_loop.py": ("--kind", "workers", "--count", 64, "--steps", 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", FRAMEWORKS)
def test_ranks_end_at_one_boundary_where_one_of_them_has_lost_a_worker(tmp_path: Path, program: str) -> None:
    """Its peer has got its batch, and waits for the gradients."""

    def run(folder: str, asks: int) -> Any:
        given = ("--dir", tmp_path / folder, *FRAMEWORKS[program])
        return launch(PROGRAMS / "frail.py", asks, program, *given, processes=2)

    stopped = run("run", 7)
    assert stopped.code == 75, stopped.output
    assert "rank 1 loads " in stopped.output
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["committed_step"]) == ("signal", ended["step"])
    assert ended["step"] in (6, 7)  # A framework reads a batch ahead.
    for folder in ("run", "whole"):
        done = run(folder, 0)
        assert done.code == 0, done.output
    assert event(tmp_path / "run", "restored")["lost_steps"] == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
