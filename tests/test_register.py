"""Objects may be registered in any order and in several calls; a scheduler may be built before the restore or after."""

from __future__ import annotations

import copy
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import one_rank
import pytest
import torch
from torch import nn

from trainer.checkpoint.state import StateError
from trainer.training.current_gpu import make_current


class Parts:
    """What a GAN's script makes, in one state at the start."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.zeta = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.alpha = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.1))
        self.of_zeta = torch.optim.AdamW(self.zeta.parameters(), lr=0.1)
        self.of_alpha = torch.optim.SGD(self.alpha.parameters(), lr=0.01, momentum=0.9)
        self.sum = nn.Linear(1, 1)
        """A module without an optimizer: an average."""

    def schedule(self) -> torch.optim.lr_scheduler.OneCycleLR:
        """Sets the optimizer's learning rate, and further options, when it is built."""
        return torch.optim.lr_scheduler.OneCycleLR(self.of_zeta, max_lr=0.2, total_steps=40)


Register = Callable[[Any, Parts], Any]


def together(run: Any, parts: Parts) -> Any:
    schedule = parts.schedule()
    run.register(
        zeta=parts.zeta, alpha=parts.alpha, of_zeta=parts.of_zeta, of_alpha=parts.of_alpha, sum=parts.sum,
        schedule=schedule,
    )  # fmt: skip
    return schedule


def another_order(run: Any, parts: Parts) -> Any:
    schedule = parts.schedule()
    run.register(
        schedule=schedule, sum=parts.sum, of_alpha=parts.of_alpha, of_zeta=parts.of_zeta, alpha=parts.alpha,
        zeta=parts.zeta,
    )  # fmt: skip
    return schedule


def one_by_one(run: Any, parts: Parts) -> Any:
    run.register(zeta=parts.zeta)
    run.register(of_zeta=parts.of_zeta)
    assert len(parts.of_zeta.state) == (6 if run.step else 0), "what is registered is restored at once"
    run.register(alpha=parts.alpha)
    run.register(sum=parts.sum)
    schedule = parts.schedule()  # After the restore: it puts the first learning rate into the optimizer.
    run.register(schedule=schedule)
    run.register(of_alpha=parts.of_alpha)
    return schedule


def backwards(run: Any, parts: Parts) -> Any:
    run.register(sum=parts.sum)
    run.register(alpha=parts.alpha, of_alpha=parts.of_alpha)
    run.register(zeta=parts.zeta, of_zeta=parts.of_zeta)
    schedule = parts.schedule()
    run.register(schedule=schedule)
    return schedule


def attempt(folder: Path, register: Register, until: int, fails_at: int = 0) -> dict[str, Any]:
    """Train in this process; returns all that was trained."""
    parts, found = Parts(), dict[str, Any]()
    loader = [torch.full((4, 1), float(number)) for number in range(5)]
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    env = dict(os.environ)
    try:
        with one_rank.InProcess(folder, save_every=3) as run:
            schedule = register(run, parts)
            for batch in run.steps(loader, until=until):
                if fails_at and run.step == fails_at:
                    run._own._session.saver.wait()
                    raise KeyboardInterrupt
                parts.zeta(parts.alpha(batch)).square().mean().backward()
                for optimizer in (parts.of_zeta, parts.of_alpha):
                    optimizer.step()
                    optimizer.zero_grad()
                schedule.step()
                with torch.no_grad():
                    parts.sum.weight += parts.zeta[2].bias
            run.finish(lambda folder: None)
            modules = {"zeta": parts.zeta, "alpha": parts.alpha, "sum": parts.sum}
            found = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
            found["lr"] = schedule.get_last_lr()
            found["momenta"] = [parts.of_alpha.state[one]["momentum_buffer"] for one in parts.alpha.parameters()]
    except one_rank.Left:
        if not fails_at:
            raise
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(env)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return attempt(tmp_path_factory.mktemp("whole") / "run", together, 9)


PAIRS = [(together, another_order), (another_order, together), (one_by_one, backwards), (backwards, one_by_one)]


@pytest.mark.parametrize(("first", "later"), PAIRS, ids=lambda way: way.__name__)
def test_objects_are_registered_in_any_order_and_in_several_calls(
    tmp_path: Path, undisturbed: dict[str, Any], first: Register, later: Register
) -> None:
    attempt(tmp_path / "run", first, 9, fails_at=4)
    assert same(attempt(tmp_path / "run", later, 9), undisturbed)


def test_a_scheduler_that_is_built_after_the_restore_and_not_registered_is_missed(tmp_path: Path) -> None:
    attempt(tmp_path / "run", together, 9, fails_at=4)

    def forgotten(run: Any, parts: Parts) -> Any:
        run.register(zeta=parts.zeta, of_zeta=parts.of_zeta, alpha=parts.alpha, of_alpha=parts.of_alpha, sum=parts.sum)
        return parts.schedule()

    with pytest.raises(one_rank.Left) as left:
        attempt(tmp_path / "run", forgotten, 9)
    assert left.value.code == StateError.code
    assert "the checkpoint has 'schedule', which is not registered and would be lost" in str(left.value.error)


def test_an_optimizer_comes_after_its_module(tmp_path: Path) -> None:
    def early(run: Any, parts: Parts) -> Any:
        run.register(of_zeta=parts.of_zeta)

    with pytest.raises(one_rank.Left) as left:
        attempt(tmp_path / "run", early, 9)
    assert "register(of_zeta=...): it trains a parameter of no registered module" in str(left.value.error)
    assert "Register the module before it, or in the same call" in str(left.value.error)


@pytest.mark.parametrize(
    ("devices", "current"),
    [(["cuda:1", "cpu", "cuda:1"], ["cuda:1"]), (["cuda:0", "cuda:1"], []), (["cpu"], []), ([], [])],
)
def test_the_gpu_of_the_modules_becomes_the_current_one_whose_random_numbers_are_saved(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], current: list[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    make_current([types.SimpleNamespace(device=torch.device(name)) for name in devices])  # type: ignore[misc]
    assert asked == current
