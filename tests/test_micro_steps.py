"""A stop within a step of a loop of one's own drops its micro-steps; the boundary before it is saved exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from clock import Clock
from support import event
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from trainer import SpotRun
from trainer.checkpoint.state import State
from trainer.training import kept, stepping

ROWS = torch.randn(36, 4, generator=torch.Generator().manual_seed(1))
MICRO_STEPS = 4
STEPS = 4

Between = Callable[[SpotRun, int], None]
"""Called after the passes of each batch, with the number of batches so far in this attempt."""


class Seen:
    """A metric: it changes in each micro-step."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(4), 0

    def update(self, batch: torch.Tensor) -> None:
        self.total, self.count = self.total + batch.detach().sum(0), self.count + len(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"].clone(), state["count"]


class Training:
    """What a program makes, and how it trains; a micro-step draws random numbers, and changes all that it can."""

    def __init__(self, run: SpotRun, accelerator: Accelerator | None = None) -> None:
        self.run, self.accelerator = run, accelerator
        self.model: Any = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule: Any = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.average, self.seen, self.draws = AveragedModel(self.model), Seen(), torch.Generator()
        self.loader: Any = DataLoader(TensorDataset(ROWS), batch_size=3, shuffle=True)
        if accelerator:
            self.model, self.optimizer, self.loader = accelerator.prepare(self.model, self.optimizer, self.loader)
        run.register(
            model=self.model, optimizer=self.optimizer, schedule=self.schedule, average=self.average, seen=self.seen,
            draws=self.draws,
        )  # fmt: skip

    def train(self, between: Between = lambda run, count: None) -> None:
        run = self.run
        for count, [batch] in enumerate(self._batches(), start=1):
            self.seen.update(batch)
            run.state["noise"] = float(torch.rand(1, generator=self.draws))
            run.state.setdefault("all", []).append(count)
            run.state["all"] = run.state["all"][-3:]
            loss = (self.model(batch) - batch.sum(1, keepdim=True)).square().mean() + run.state["noise"]
            if self.accelerator:
                self.accelerator.backward(loss)
            else:
                (loss / MICRO_STEPS).backward()
            between(run, count)
            if run.ends_step:
                run.log(loss=loss.item(), seen=self.seen.count)
                self.update()
        run.finish()

    def _batches(self) -> Iterator[Any]:
        if not self.accelerator:
            yield from self.run.steps(self.loader, until=STEPS, accumulate=MICRO_STEPS)
            return
        for batch in self.run.steps(self.loader, until=STEPS):
            with self.accelerator.accumulate(self.model):
                yield batch

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.average.update_parameters(self.model)


def own(run: SpotRun) -> Training:
    forget_accelerate()
    return Training(run)


def accelerated(run: SpotRun) -> Training:
    forget_accelerate()
    return Training(run, Accelerator(cpu=True, gradient_accumulation_steps=MICRO_STEPS))


def forget_accelerate() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def trained(
    folder: Path, make: Callable[[SpotRun], Training] = own, between: Between = lambda *_: None
) -> tuple[int, in_process.Attempts]:
    """An attempt's exit code, and the run."""
    attempts = in_process.Attempts(folder)
    code = attempts.one(lambda run, strike: make(run).train(between), save_every=100)
    return code, attempts


def stop(run: SpotRun) -> None:
    in_process.stop()
    assert run.notices.received.wait(60)


def stops_in(batch: int, clock: Clock, seconds: float = 6) -> Between:
    """A micro-step takes so many seconds; the stop comes in this one of the attempt."""

    def between(run: SpotRun, count: int) -> None:
        if count == batch:
            stop(run)
        clock.added += seconds

    return between


@pytest.fixture(scope="module", params=[own, accelerated])
def make(request: pytest.FixtureRequest) -> Callable[[SpotRun], Training]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def whole(make: Callable[[SpotRun], Training], tmp_path_factory: pytest.TempPathFactory) -> in_process.Attempts:
    """The run that nothing stops."""
    code, attempts = trained(tmp_path_factory.mktemp("whole") / "run", make)
    assert code == 0
    return attempts


@pytest.mark.parametrize(
    ("noticed_in", "saved", "decision"),
    [
        (1, 0, "dropping the micro-steps of step 1"),  # No speed is known yet.
        (2 * MICRO_STEPS + 1, 2, "dropping the micro-steps of step 3"),
        (2 * MICRO_STEPS + 2, 3, "finishing step 3 first"),
        (3 * MICRO_STEPS - 1, 3, None),  # The ranks agree at the end of the step.
    ],
)
def test_a_stop_within_a_step_is_exact(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], make: Any, whole: in_process.Attempts,
    noticed_in: int, saved: int, decision: str | None,
) -> None:  # fmt: skip
    """Of an optimizer step of 24 s, with 25 s of grace."""
    code, attempts = trained(tmp_path / "run", make, stops_in(noticed_in, clock))
    said = capsys.readouterr().out
    assert code == 75, said
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["committed_step"] or 0) == ("signal", saved)
    assert [line.rpartition(": ")[2] for line in said.splitlines() if "a save an unknown time: " in line] == (
        [decision] if decision else []
    ), said
    assert trained(tmp_path / "run", make)[0] == 0
    assert attempts.result == whole.result
    assert event(tmp_path / "run", "restored")["lost_steps"] == 0


@pytest.mark.parametrize(
    ("noticed_in", "saved"),
    [(21, 1), (31, 1), (36, 2)],  # In a micro-step of the second step: the first, the 11th, the 16th.
)
def test_a_step_of_60_s_in_20_micro_steps_and_a_notice_of_30_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, noticed_in: int, saved: int
) -> None:
    monkeypatch.setitem(globals(), "MICRO_STEPS", 20)
    stopped_at: list[float] = []

    def between(run: SpotRun, count: int) -> None:
        run.notices.grace_s = 30.0
        if count == noticed_in:
            stopped_at.append(time.monotonic())
        stops_in(noticed_in, clock, 3)(run, count)

    assert trained(tmp_path / "run", own, between)[0] == 75
    assert time.monotonic() < stopped_at[0] + 30
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["committed_step"], ended["step"]) == ("signal", saved, saved)


def test_a_short_step_is_finished_and_no_boundary_is_kept_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    kept_for: list[int] = []
    monkeypatch.setattr(stepping, "keep", lambda state, streams: kept_for.append(0))

    def between(run: SpotRun, count: int) -> None:
        clock.added += 0.2
        if count == 2 * MICRO_STEPS + 1:
            stop(run)

    assert trained(tmp_path / "run", own, between)[0] == 75
    assert event(tmp_path / "run", "end")["committed_step"] == 3
    assert not kept_for
    assert "the rest of the step" not in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["parameters", "an average"])
def test_a_micro_step_that_changes_what_is_saved_is_not_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str], changed: str
) -> None:
    def make(run: SpotRun) -> Training:
        training = own(run)

        def between(run: SpotRun, count: int) -> None:
            if count == 2 * MICRO_STEPS + 1 and changed == "parameters":
                training.optimizer.step()
            elif count == 2 * MICRO_STEPS + 1:
                next(training.average.parameters()).detach().add_(1)
            stops_in(2 * MICRO_STEPS + 1, clock)(run, count)

        monkeypatch.setattr(training, "train", lambda _: Training.train(training, between))
        return training

    assert trained(tmp_path / "run", make)[0] == 75
    assert event(tmp_path / "run", "end")["committed_step"] == 3
    assert "The micro-steps have changed what is saved, so the run stops at the end of the step" in (
        capsys.readouterr().out
    )


def test_small_values_are_copied_and_the_rest_is_watched() -> None:
    tensors = {name: torch.zeros(4) for name in ("buffer", "count", "weight")} | {"large": torch.zeros(1 << 19)}
    one = State(dict(tensors), {}, buffers=frozenset(["buffer"]), steady=frozenset(["weight"]))
    boundary = kept.keep(one, torch.empty(0))
    for name in ("buffer", "count"):
        tensors[name].add_(1)
    assert boundary.is_whole
    assert not boundary.state.tensors["buffer"].any()
    assert not boundary.state.tensors["count"].any()
    for name in ("weight", "large"):
        boundary = kept.keep(one, torch.empty(0))
        assert boundary.state.tensors[name] is tensors[name]
        tensors[name].add_(1)
        assert not boundary.is_whole
    boundary = kept.keep(one, torch.empty(0))
    tensors["weight"].data = torch.ones(4)
    assert not boundary.is_whole
