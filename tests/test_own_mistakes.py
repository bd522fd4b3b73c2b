"""Mistakes in a loop of one's own that would cost state without a word: nothing registered, an optimizer forgotten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import one_rank
import pytest
import torch
from in_process import Attempts
from support import event
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from trainer import SpotRun

X = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
ITEMS = TensorDataset(X)
Loop = Callable[[SpotRun, "Parts"], None]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.1)


class Both:
    """Two optimizers in one object."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = list(optimizers)

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> dict[str, Any]:
        return {"all": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for one, saved in zip(self.optimizers, state["all"], strict=True):
            one.load_state_dict(saved)


class Parts:
    def __init__(self) -> None:
        self.model, self.critic = nn.Linear(2, 1), nn.Linear(2, 1)
        self.optimizer, self.other = adam(self.model), adam(self.critic)
        self.loader = DataLoader(ITEMS, batch_size=2)

    def backward(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        self.other.zero_grad()
        (self.model(batch[0]) + self.critic(batch[0])).square().sum().backward()


def trained(run: SpotRun, parts: Parts, step: Callable[[], None], until: int = 3) -> None:
    for batch in run.steps(parts.loader, until=until):
        parts.backward(batch)
        step()
    run.finish()


def ended(folder: Path, loop: Loop, **options: Any) -> int:
    return Attempts(folder).one(lambda run, strike: loop(run, Parts()), **options)


def none(run: SpotRun, parts: Parts) -> None:
    run.state["best"] = 1
    trained(run, parts, parts.optimizer.step)


def none_at_the_end(run: SpotRun, parts: Parts) -> None:
    run.finish()


def forgotten(run: SpotRun, parts: Parts) -> None:
    run.register(model=parts.model, critic=parts.critic, optimizer=parts.optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(parts.other)  # It holds the optimizer, and does not save it.
    run.register(scheduler=scheduler)
    trained(run, parts, Both(parts.other, parts.optimizer).step)


def zipped(run: SpotRun, parts: Parts) -> None:
    run.register(model=parts.model, optimizer=parts.optimizer)
    more = DataLoader(ITEMS, batch_size=2)
    for batch, _ in zip(run.steps(parts.loader, until=6), run.steps(more, until=6), strict=False):
        parts.backward(batch)
        parts.optimizer.step()


def nested(run: SpotRun, parts: Parts) -> None:
    run.register(model=parts.model, optimizer=parts.optimizer)
    for _ in run.steps(parts.loader, until=6):
        for batch in run.steps(parts.loader, until=6):
            parts.backward(batch)
            parts.optimizer.step()


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (none, "run.register(model=model, optimizer=optimizer, ...) is missing: nothing is registered, so nothing wou"),
        (none_at_the_end, "run.register(model=model, optimizer=optimizer, ...) is missing: nothing is registered, so"),
        (
            forgotten,
            "an optimizer (Adam) of 'critic' is not registered, so its state would be lost. Register it before",
        ),
        (zipped, "steps(): the loop over an earlier run.steps() has not ended, and both would count steps. Combine"),
        (nested, "steps(): the loop over an earlier run.steps() has not ended, and both would count steps. Combine"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_loop_that_would_lose_its_state_is_refused_before_a_step(
    tmp_path: Path, capfd: Any, loop: Loop, message: str
) -> None:
    assert ended(tmp_path, loop) == 1
    errors = capfd.readouterr().err
    assert errors.startswith(f"Error: {message}"), errors
    assert errors.count("\n") == 1
    assert event(tmp_path, "end")["step"] == 0


def around(run: SpotRun, parts: Parts) -> Callable[[], None]:
    both = Both(parts.optimizer, parts.other)
    run.register(model=parts.model, critic=parts.critic, both=both)
    return both.step


def around_a_registered_one(run: SpotRun, parts: Parts) -> Callable[[], None]:
    outer = adam(parts.model)
    outer.base_optimizer = parts.optimizer  # type: ignore[attr-defined]  # As SAM has one.
    run.register(model=parts.model, optimizer=parts.optimizer)
    return Both(outer, parts.optimizer).step


def of_no_registered_module(run: SpotRun, parts: Parts) -> Callable[[], None]:
    run.register(model=parts.model, optimizer=parts.optimizer)
    return Both(parts.optimizer, parts.other).step


def new_in_each_step(run: SpotRun, parts: Parts) -> Callable[[], None]:
    run.register(model=parts.model, critic=parts.critic, optimizer=parts.optimizer)
    return lambda: Both(parts.optimizer, adam(parts.critic)).step()


def with_a_scaler(run: SpotRun, parts: Parts, is_registered: bool = False) -> Callable[[], None]:
    scaler = torch.amp.GradScaler("cpu")
    torch.amp.GradScaler("cpu").scale(torch.ones(1))  # Used for something else.
    run.register(model=parts.model, optimizer=parts.optimizer, **({"scaler": scaler} if is_registered else {}))

    def step() -> None:
        scaler.scale(torch.ones(1))
        scaler.step(parts.optimizer)
        scaler.update()

    return step


def with_a_registered_scaler(run: SpotRun, parts: Parts) -> Callable[[], None]:
    return with_a_scaler(run, parts, is_registered=True)


@pytest.mark.parametrize(
    ("register", "lines"),
    [
        (around, []),
        (around_a_registered_one, []),
        (of_no_registered_module, []),
        (new_in_each_step, ["An optimizer (Adam) of 'critic' was made after the first call of run.steps(), and its"]),
        (with_a_scaler, ["A GradScaler is used and is not registered: after a resume its scale would start over"]),
        (with_a_registered_scaler, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_may_be_unregistered_is_named_once_at_most(
    tmp_path: Path, capfd: Any, register: Callable[[SpotRun, Parts], Callable[[], None]], lines: list[str]
) -> None:
    assert ended(tmp_path, lambda run, parts: trained(run, parts, register(run, parts))) == 0
    said = capfd.readouterr().out.splitlines()
    named = [line for line in said if "egister it" in line]
    assert len(named) == len(lines), said
    assert all(start in line for start, line in zip(lines, named, strict=True)), named
    assert not _global_optimizer_pre_hooks


@pytest.mark.parametrize("which", ["first", "second", "made in the loop"])
def test_a_step_of_an_optimizer_waits_for_the_copy_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, which: str
) -> None:
    copied_late = one_rank.copied_late(monkeypatch)
    at: dict[int, torch.Tensor] = {}

    def loop(run: SpotRun, parts: Parts) -> None:
        run.register(zeta=parts.optimizer, model=parts.model, critic=parts.critic, alpha=parts.other)
        if at:
            assert run.step == 2
            assert torch.equal(parts.model.weight, at[2])
            assert torch.equal(parts.critic.weight, at[-2])
        for batch in run.steps(parts.loader, until=4):
            parts.backward(batch)
            if run.step == 2:
                at.update({2: parts.model.weight.detach().clone(), -2: parts.critic.weight.detach().clone()})
                one = {"first": parts.other, "second": parts.optimizer}.get(which) or adam(parts.model)
                one.step()
                copied_late.set()
                assert run._own
                run._own._session.saver.wait()
                raise RuntimeError("as planned")
            parts.other.step()
            parts.optimizer.step()

    assert ended(tmp_path, loop, save_every=2) == 1
    capfd.readouterr()
    assert ended(tmp_path, loop, save_every=2) == 1
    assert "Error: as planned" in capfd.readouterr().err


def test_each_loader_has_a_sampler_and_only_those_of_steps_bind_the_run(tmp_path: Path, capfd: Any) -> None:
    def loop(run: SpotRun, parts: Parts, fails_at: int = 0, size: int = 4) -> None:
        run.register(model=parts.model, optimizer=parts.optimizer)
        first = run.sampler(ITEMS, global_batch_size=2)
        second = run.sampler(ITEMS, global_batch_size=size)
        run.sampler(TensorDataset(X[:3]), global_batch_size=1)  # For a validation.
        for sampler, until in ((first, 3), (second, 6)):
            for batch in run.steps(DataLoader(ITEMS, batch_sampler=sampler), until=until):
                parts.backward(batch)
                parts.optimizer.step()
                if run.step + 1 == fails_at:
                    raise RuntimeError("as planned")
        run.finish()

    for fails_at in (3, 5):
        assert ended(tmp_path, lambda run, parts, at=fails_at: loop(run, parts, at), save_every=1) == 1  # type: ignore[misc]
    assert event(tmp_path, "bound")["binding"]["global_batch_size"] == 2
    capfd.readouterr()
    assert ended(tmp_path, lambda run, parts: loop(run, parts, size=8), save_every=1) == 1
    assert (
        "this run was started with global_batch_size_2=4, not global_batch_size_2=8. Use another run name, or give "
        'SpotRun(allow_config_change=["global_batch_size_2"])'
    ) in capfd.readouterr().err
    assert ended(tmp_path, loop) == 0


def test_a_save_that_takes_longer_than_the_interval_names_the_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("trainer.training.session.REPORTED_WAIT_S", -1.0)

    def loop(run: SpotRun, parts: Parts) -> None:
        run.register(model=parts.model, optimizer=parts.optimizer)
        trained(run, parts, parts.optimizer.step)

    assert ended(tmp_path, loop, save_every=1) == 0
    assert "Raise save_every, or leave it out." in capfd.readouterr().out
