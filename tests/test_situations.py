"""Situations that people have reported of other tools: where a resume has to be exact in a loop of one's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Attempts, Script
from support import column, event
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import SpotRun
from trainer.layout.names import RunPaths, list_checkpoints

X = torch.randn(18, 3, generator=torch.Generator().manual_seed(1))
ITEMS = TensorDataset(X, X.sum(1, keepdim=True))


@pytest.fixture
def attempts(tmp_path: Path) -> Callable[[str], Attempts]:
    """Makes a run of a name."""
    return lambda name: Attempts(tmp_path / name)


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def shuffled() -> DataLoader[Any]:
    """5 batches."""
    return DataLoader(ITEMS, batch_size=4, shuffle=True)


def train(run: SpotRun, strike: Callable[[], None], model: nn.Module, optimizer: Any, batch: Any) -> None:
    """One step."""
    strike()
    x, y = batch
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    run.log(loss=loss)


def until(end: int) -> Script:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for batch in run.steps(shuffled(), until=end):
            train(run, strike, model, optimizer, batch)
        run.finish()

    return script


PLACES = {
    "in epoch 2": [8],
    "in epoch 3": [13],
    "at an epoch's end": [5, 10],
    "at an epoch's start": [6, 11],
    "three times within an epoch": [7, 8, 9],
}


@pytest.mark.parametrize("kind", ["stop", pytest.param("crash", marks=pytest.mark.slow)])
def test_a_run_is_resumed_wherever_in_an_epoch_it_was_struck(attempts: Any, kind: str) -> None:
    whole = attempts("whole").all(until(16)).result
    assert sorted(whole[0]) == list(range(1, 17))
    for place, strikes in PLACES.items():
        assert attempts(place).all(until(16), strikes, kind).result == whole, place


def test_the_patience_of_an_early_stop_outlives_a_preemption(attempts: Any) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for batch in run.steps(shuffled(), until=100):
            train(run, strike, model, optimizer, batch)
            score = abs(run.step + 1 - 6)  # The best one is that of step 6.
            best, bad = run.state.get("best", 100), run.state.get("bad", 0)
            run.state.update(best=min(best, score), bad=0 if score < best else bad + 1)
            if run.state["bad"] == 5:
                break
        run.finish()

    whole = attempts("whole").all(script).result
    assert sorted(whole[0]) == list(range(1, 12))
    struck = attempts("struck").all(script, [8, 10])
    assert struck.result == whole
    struck.all(script)
    assert event(struck.folder, "end")["cause"] == "already-finished"


def test_the_folder_of_a_run_may_move(attempts: Any) -> None:
    first, then = attempts("first"), attempts("then")
    assert first.one(until(16), strike=8) == 75
    shutil.move(first.folder, then.folder)
    assert then.all(until(16)).result == attempts("whole").all(until(16)).result
    assert event(then.folder, "restored")["step"] == 8


def test_a_finished_run_that_is_asked_for_more_steps_goes_on_within_its_epoch(attempts: Any) -> None:
    more = attempts("more").all(until(8)).all(until(13))
    assert more.result == attempts("whole").all(until(13)).result
    assert event(more.folder, "restored")["step"] == 8


def test_a_finished_run_that_is_asked_for_fewer_steps_says_so(attempts: Any, capfd: Any) -> None:
    run = attempts("run").all(until(8))
    assert run.one(until(5)) == 1
    assert (
        "is already at step 8, past until=5. Raise it, or use another run name. `len(loader)`" in capfd.readouterr().err
    )


@pytest.mark.parametrize("sampled", [False, True], ids=["a loader", "run.sampler"])
def test_the_epoch_is_the_loaders_in_every_attempt(attempts: Any, sampled: bool) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        loader = shuffled()
        if sampled:
            loader = DataLoader(ITEMS, batch_sampler=run.sampler(ITEMS, global_batch_size=6))
        for batch in run.steps(loader, until=16):
            run.log(in_epoch=run.epoch)
            train(run, strike, model, optimizer, batch)
        run.finish()

    struck = attempts("run").all(script, [3, 6, 12])
    assert column(struck.folder, "in_epoch") == [step // (3 if sampled else 5) for step in range(16)]


@pytest.mark.parametrize("sampled", [False, True], ids=["a loader", "run.sampler"])
def test_a_loader_shorter_than_a_step_resumes_exactly(attempts: Any, sampled: bool) -> None:
    """Of three items, a step of 8 has all of them twice and more; each batch of 4 has three, or is of two epochs."""
    few = TensorDataset(X[:3], X[:3].sum(1, keepdim=True))

    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        loader, accumulate = DataLoader(few, batch_size=4, shuffle=True), 2
        if sampled:
            loader = DataLoader(few, batch_sampler=run.sampler(few, global_batch_size=8, micro_batch_size=4))
        samples = 0
        for x, y in run.steps(loader, until=8, accumulate=None if sampled else accumulate):
            samples += len(x)
            loss = (model(x) - y).square().mean()
            loss.backward()
            if run.ends_step:
                strike()
                optimizer.step()
                optimizer.zero_grad()
                run.log(loss=loss, samples=samples)
                samples = 0
        run.finish()

    whole = attempts("whole").all(script)
    assert column(whole.folder, "samples") == [8 if sampled else 6] * 8
    assert attempts("struck").all(script, [4, 7]).result == whole.result


@dataclass
class Rows:
    """A batch as a dataclass."""

    x: torch.Tensor
    y: torch.Tensor


def test_a_batch_may_be_a_dataclass(attempts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(items: list[tuple[torch.Tensor, torch.Tensor]]) -> Rows:
        return Rows(*(torch.stack(one) for one in zip(*items, strict=True)))

    def script(run: SpotRun, strike: Callable[[], None], collate: Any = rows) -> None:
        monkeypatch.setenv("SKYSPOT_TRACE_STEPS", "1")  # As in a rehearsal, which compares the batches.
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        loader = DataLoader(ITEMS, batch_size=4, shuffle=True, collate_fn=collate)
        for batch in run.steps(loader, until=8):
            assert isinstance(batch, Rows if collate else list)
            train(run, strike, model, optimizer, (batch.x, batch.y) if isinstance(batch, Rows) else batch)
        run.finish()

    whole = attempts("whole").all(script)
    struck = attempts("struck").all(script, [3, 7])
    assert struck.result == whole.result
    lists = attempts("lists").all(lambda run, strike: script(run, strike, None))
    assert lists.result == whole.result
    batches = column(whole.folder, "batch")
    assert len(set(batches)) == 8
    assert batches == column(struck.folder, "batch") == column(lists.folder, "batch")


@pytest.mark.parametrize("digits", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_the_newest_checkpoint_is_the_one_of_the_last_step_whatever_the_times_of_files(
    attempts: Any, digits: int
) -> None:
    last = 10 ** (digits - 1)
    weight = nn.Linear(1, 1)
    rows = [torch.ones(1)] * 50

    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        optimizer = torch.optim.SGD(weight.parameters(), lr=1e-5)
        run.register(weight=weight, optimizer=optimizer)
        for batch in run.steps(rows, until=last + 2):
            strike()
            weight(batch).backward()
            optimizer.step()
        run.finish()

    run = attempts("run")
    assert run.one(script, strike=last, save_every=max(1, (last - 1) // 3)) == 75
    saved = list_checkpoints(RunPaths(run.folder))
    assert [name.step for name in saved][:2] == [last, last - 1]
    for age, name in enumerate(saved):
        for path in (folder := RunPaths(run.folder).checkpoint(name), *folder.iterdir()):
            os.utime(path, (1e9 + age, 1e9 + age))  # The newest one has the oldest files.
    assert run.one(script) == 0
    assert event(run.folder, "restored")["step"] == last


def same_loader(*ends: int) -> Callable[[SpotRun], Iterator[tuple[Any, int]]]:
    def calls(run: SpotRun) -> Iterator[tuple[Any, int]]:
        loader = shuffled()
        return ((loader, end) for end in ends)

    return calls


def new_loaders(*ends: int) -> Callable[[SpotRun], Iterator[tuple[Any, int]]]:
    def calls(run: SpotRun) -> Iterator[tuple[Any, int]]:
        return ((shuffled(), end) for end in ends)

    return calls


def counted(run: SpotRun) -> Iterator[tuple[Any, int]]:
    """As a program calls it that begins where the run is."""
    loader = shuffled()
    while run.step < 16:
        yield loader, min(16, (run.step // 6 + 1) * 6)


def curriculum(run: SpotRun) -> Iterator[tuple[Any, int]]:
    yield DataLoader(ITEMS, batch_size=2), 7
    yield shuffled(), 16


CALLS = {
    "each epoch": same_loader(5, 10, 15, 16),
    "every 6 steps": same_loader(6, 12, 16),
    "from run.step": counted,
    "a new loader each epoch": new_loaders(5, 10, 15, 16),
    "a new loader within epochs": new_loaders(6, 12, 16),
    "another loader": curriculum,
}


QUICK = ("every 6 steps", "another loader")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_a_loop_in_several_calls_resumes_in_each(attempts: Any, name: str) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for loader, end in CALLS[name](run):
            for batch in run.steps(loader, until=end):
                train(run, strike, model, optimizer, batch)
        run.finish()

    whole = attempts("whole").all(script).result
    assert sorted(whole[0]) == list(range(1, 17))
    if "loader" not in name:  # The calls make no difference.
        assert attempts("in one call").all(until(16)).result == whole
    assert attempts("stopped").all(script, [5, 6, 9, 10, 14]).result == whole
    assert attempts("between").all(script, [7, 12]).result == whole
    assert attempts("crashed").all(script, [8, 13], "crash").result == whole
    assert attempts("more").all(until_of(CALLS[name], 12)).all(script).result == whole


def until_of(calls: Callable[[SpotRun], Iterator[tuple[Any, int]]], last: int) -> Script:
    """The same program with its end at step 12, in the calls that come before."""

    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for loader, end in calls(run):
            for batch in run.steps(loader, until=min(end, last)):
                train(run, strike, model, optimizer, batch)
            if end >= last:
                break
        run.finish()

    return script


def test_a_loop_that_leaves_a_loader_early_resumes_with_the_next_one(attempts: Any) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for batch in run.steps(DataLoader(ITEMS, batch_size=2), until=100):
            train(run, strike, model, optimizer, batch)
            if run.step + 1 == 4:
                break
        for batch in run.steps(shuffled(), until=12):
            train(run, strike, model, optimizer, batch)
        run.finish()

    whole = attempts("whole").all(script).result
    assert attempts("struck").all(script, [3, 6, 9]).result == whole


@pytest.mark.slow
@pytest.mark.parametrize(("counts", "size"), [("run.step", 5), ("run.state", 6)])  # The first can be an epoch only.
def test_an_attempt_that_skips_the_calls_that_are_done_goes_on_as_if_it_had_not(
    attempts: Any, counts: str, size: int
) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for call in range(run.step // size if counts == "run.step" else run.state.get("calls", 0), 3):
            loader = DataLoader(TensorDataset(X + call, X.sum(1, keepdim=True)), batch_size=4, shuffle=True)
            for batch in run.steps(loader, until=size * (call + 1)):
                train(run, strike, model, optimizer, batch)
            if counts == "run.state":
                optimizer.param_groups[0]["lr"] /= 2
                run.state["calls"] = call + 1
        run.finish()

    whole = attempts("whole").all(script).result
    assert sorted(whole[0]) == list(range(1, 3 * size + 1))
    run = attempts("at an end").all(script, [2 * size])
    assert event(run.folder, "restored")["step"] == 2 * size
    assert run.result == whole
    assert attempts("within").all(script, [8, 14], "crash").result == whole


def test_an_iterator_that_can_be_read_once_is_named(attempts: Any, capfd: Any) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for batch in run.steps(iter(shuffled()), until=16):
            train(run, strike, model, optimizer, batch)
        run.finish()

    assert attempts("run").one(script) == 1
    assert "DataLoaderIter can be read only once. Give the loader itself" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ({"until": "9"}, {}, "steps(until='9'): give a number of steps, 1 or more"),
        ({"until": 1e3}, {}, "steps(until=1000.0): give a number of steps"),
        ({"until": 0}, {}, "steps(until=0): give a number of steps"),
        ({"loader": 5}, {}, "steps(loader): a int cannot be iterated over. Give a DataLoader"),
        ({"loader": []}, {}, "steps(loader): the loader has no batch. Check the length of the data set"),
        (
            {"loader": DataLoader(ITEMS, batch_size=64, drop_last=True)},
            {},
            "steps(loader): the loader has no batch. Check the length of the data set, and drop_last where it is",
        ),
        ({}, {"binding": {"lr": float("nan")}}, "binding 'lr': nan cannot be recorded; use finite numbers"),
        ({}, {"binding": "lr"}, "SpotRun(binding='lr'): give a dict of names and values"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) and value else "",
)
def test_a_mistake_in_a_value_is_said_in_a_line(
    attempts: Any, capfd: Any, steps: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer)
        for _ in run.steps(**{"loader": shuffled(), "until": 9, **steps}):
            raise AssertionError("not refused")

    assert attempts("run").one(script, **options) == 1
    errors = capfd.readouterr().err
    assert errors.startswith(f"Error: {message}")
    assert errors.count("\n") == 1


def test_a_path_in_the_binding_is_recorded_as_text(attempts: Any) -> None:
    run = attempts("run")
    assert run.one(until(3), binding={"data": Path("a/b"), "size": torch.tensor(3)}) == 0
    assert event(run.folder, "start")["binding"] == {"data": "a/b", "size": 3}


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization, as people write it: two passes a step, around another optimizer."""

    def __init__(self, parameters: Iterable[nn.Parameter], rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.02, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=group["rho"])
                parameter.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        assert closure
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()

    def state_dict(self) -> dict[str, Any]:
        return {"own": super().state_dict(), "base": self.base_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["own"])
        self.base_optimizer.load_state_dict(state["base"])
        self.param_groups = self.base_optimizer.param_groups


@pytest.mark.parametrize("way", ["LBFGS", "SAM", "SAM by hand"])
def test_an_optimizer_that_evaluates_the_loss_again_resumes_exactly(attempts: Any, way: str) -> None:
    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model, _ = parts()
        sam = Sam(model.parameters())
        lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)
        optimizer = lbfgs if way == "LBFGS" else sam
        run.register(model=model, optimizer=sam.base_optimizer if way == "SAM by hand" else optimizer)
        for x, y in run.steps(shuffled(), until=9):

            def closure(x: Any = x, y: Any = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            strike()
            loss = closure()
            if way == "SAM by hand":
                sam.first_step()
                closure()
                sam.second_step()
            else:
                optimizer.step(closure)
            run.log(loss=loss)
        run.finish()

    whole = attempts("whole").all(script).result
    assert attempts("stopped").all(script, [4, 7]).result == whole
    assert attempts("crashed").all(script, [5, 8], "crash").result == whole
