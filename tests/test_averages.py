"""Averaged weights (EMA, SWA): their counters are saved or named, and a save never holds them in the model's place."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import one_rank
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.training import unsaved


class InLists:
    """An average in lists, with weights set aside meanwhile, in the manner of the package torch_ema."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.5) -> None:
        self.decay, self.num_updates = decay, 0
        self.parameters = parameters
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]
        self.collected_params: list[torch.Tensor] | None = None

    def update(self) -> None:
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (10 + self.num_updates))
        for shadow, parameter in zip(self.shadow_params, self.parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        self.collected_params = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, shadow in zip(self.parameters, self.shadow_params, strict=True):
            parameter.data.copy_(shadow.data)
        yield
        for parameter, kept in zip(self.parameters, self.collected_params, strict=True):
            parameter.data.copy_(kept.data)
        self.collected_params = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "decay": self.decay, "num_updates": self.num_updates, "shadow_params": self.shadow_params,
            "collected_params": self.collected_params,
        }  # fmt: skip

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.num_updates = saved["num_updates"]
        self.shadow_params = [value.clone() for value in saved["shadow_params"]]


class ForgetfulLists(InLists):
    def state_dict(self) -> dict[str, Any]:
        return {"shadow_params": self.shadow_params}


class AModule(nn.Module):
    """A deep copy in a module, in the manner of timm's ModelEmaV2; it counts in an attribute, or in a buffer."""

    def __init__(self, model: nn.Module, forgets: bool) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)
        if forgets:
            self.updates = 0
        else:
            self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        with torch.no_grad():
            for mine, other in zip(self.module.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, 0.5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda model: InLists(list(model.parameters())), []),
        (lambda model: ForgetfulLists(list(model.parameters())), ["ema.num_updates"]),
        (lambda model: AModule(model, forgets=False), []),
        (lambda model: AModule(model, forgets=True), ["ema.updates"]),
        (lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), []),
    ],
    ids=["lists", "lists that forget", "module", "module that forgets", "AveragedModel"],
)
def test_a_counter_that_no_state_dict_holds_is_named(make: Callable[[nn.Module], Any], named: list[str]) -> None:
    model = nn.Linear(2, 1)
    ema, models = make(model), nn.Module()
    models._modules["model"] = model
    others = {}
    if isinstance(ema, nn.Module):
        models._modules["ema"] = ema
    else:
        others["ema"] = ema
    before = unsaved.attributes(models, others)
    update: Any = (
        ema.update if isinstance(ema, InLists) else getattr(ema, "update_parameters", getattr(ema, "update", 0))
    )
    update(*([] if isinstance(ema, InLists) else [model]))
    assert unsaved.changed(before, unsaved.attributes(models, others)) == named


class Trained:
    """A loop of the user's own in this process, with an average that is swapped in for an evaluation."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.ema = InLists(list(self.model.parameters()))
        self.at: dict[int, torch.Tensor] = {}
        """The weights at each boundary."""
        self.first = 0
        self.folder = folder

    def run(self, until: int, on_batch: Callable[[Any, Trained], None], after: Callable[[Trained], None]) -> None:
        loader = [torch.full((3, 4), float(number)) for number in range(4)]
        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        env = dict(os.environ)
        try:
            with one_rank.InProcess(self.folder, save_every=2) as run:
                run.register(model=self.model, optimizer=self.optimizer, ema=self.ema)
                self.first = run.step
                self.at[run.step] = self.model.weight.detach().clone()
                for batch in run.steps(loader, until=until):
                    on_batch(run, self)
                    self.model(batch).square().mean().backward()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.ema.update()
                    self.at[run.step + 1] = self.model.weight.detach().clone()
                after(self)
                run.finish(lambda folder: None)
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(env)


@pytest.fixture
def copied_late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    return one_rank.copied_late(monkeypatch)


def test_an_evaluation_with_averaged_weights_right_after_a_save_does_not_reach_the_checkpoint(
    tmp_path: Path, copied_late: threading.Event
) -> None:
    def evaluated(run: Any, trained: Trained) -> None:
        if run.step == 4:
            with trained.ema.swapped_in():
                assert not torch.equal(trained.model.weight, trained.at[4])
                copied_late.set()
                run._own._session.saver.wait()
            raise KeyboardInterrupt  # A crash: the next attempt begins with the checkpoint of step 4.

    trained = Trained(tmp_path / "run")
    with pytest.raises(one_rank.Left):
        trained.run(6, evaluated, lambda trained: None)
    again = Trained(tmp_path / "run")
    again.run(6, lambda run, trained: None, lambda trained: None)
    assert again.first == 4
    assert torch.equal(again.at[4], trained.at[4])


def test_averaged_weights_swapped_in_for_the_export_are_not_in_the_last_checkpoint(
    tmp_path: Path, copied_late: threading.Event
) -> None:
    def swap(trained: Trained) -> None:
        trained.ema.swapped_in().__enter__()
        copied_late.set()

    trained = Trained(tmp_path / "run")
    trained.run(4, lambda run, trained: None, swap)
    more = Trained(tmp_path / "run")
    more.run(6, lambda run, trained: None, lambda trained: None)
    assert more.first == 4
    assert torch.equal(more.at[4], trained.at[4])
