"""What passes change in a model, as buffers or as extra state: a pass that does not count leaves nothing behind."""

from __future__ import annotations

import io
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import one_rank
import pytest
import torch
from support import event, weights
from torch import nn

from trainer.checkpoint import forward_state
from trainer.training.fit import Fit


class Counting(nn.Linear):
    """Counts its passes, and learns otherwise at each."""

    def __init__(self) -> None:
        super().__init__(4, 1)

    def passes(self) -> int:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + 0.01 * self.passes())


class InBuffer(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def passes(self) -> int:
        self.count += 1
        return int(self.count)


class InNumber(Counting):
    count = 0

    def passes(self) -> int:
        self.count += 1
        return self.count

    def get_extra_state(self) -> Any:
        return self.count

    def set_extra_state(self, state: Any) -> None:
        self.count = state


class InTensor(Counting):
    """Gives its own tensor away, and counts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"history": [torch.zeros(2)], "recipe": None}

    def passes(self) -> int:
        self.kept["history"][0] += 1
        return int(self.kept["history"][0][0])

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


MODELS = [InBuffer, InNumber, InTensor]


def ask_to_stop(run: one_rank.InProcess) -> None:
    if not run.notices.received.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
        run.notices.received.wait(10)


@pytest.mark.parametrize("within", ["step", "evaluation"])
@pytest.mark.parametrize("model", MODELS)
def test_what_a_stop_cuts_off_leaves_nothing_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Callable[[], nn.Module], within: str
) -> None:
    options = {"model": model, "micro_batch_size": 1, "held_out": one_rank.Numbers(3), "eval_interval_steps": 3}
    assert one_rank.train(tmp_path / "whole", **options).code == 0
    runs: list[one_rank.InProcess] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 3 and torch.is_grad_enabled() == (within == "step"):
            ask_to_stop(runs[0])
        return one_rank.squares(model, batch)

    with monkeypatch.context() as hurried:
        hurried.setattr(Fit, "fits", False)
        assert one_rank.train(tmp_path / "run", loss=loss, before=runs.append, **options).code == 75
    assert event(tmp_path / "run", "end")["committed_step"] == 3
    assert one_rank.train(tmp_path / "run", **options).code == 0
    assert event(tmp_path / "run", "restored")["step"] == 3
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["throw-away", "evaluation", "no weight", "skipped"])
@pytest.mark.parametrize("model", MODELS)
def test_a_pass_that_does_not_count_is_not_counted(tmp_path: Path, model: Callable[[], nn.Module], kind: str) -> None:
    made, runs = [], list[one_rank.InProcess]()

    def make() -> nn.Module:
        made.append(model())
        return made[0]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        total = one_rank.squares(model, batch)
        return total * math.nan if kind == "skipped" and runs[0].steps_done == 3 else total

    options: dict[str, Any] = {"micro_batch_size": 1, "on_nan": "skip"}
    if kind == "evaluation":
        options |= {"held_out": one_rank.Numbers(3), "eval_interval_steps": 2}
    if kind == "no weight":
        first = one_rank.Numbers().batch(range(4))[:, 0]  # type: ignore[arg-type]
        options["samples"] = one_rank.Numbers(4, weigh=lambda batch: int(batch[0, 0] != first[0]))
    assert one_rank.train(tmp_path / "run", model=make, loss=loss, before=runs.append, **options).code == 0
    expected = {"no weight": 6 * 3, "skipped": 5 * 4}.get(kind, 6 * 4)
    assert made[0].passes() == expected + 1


def test_extra_state_of_any_kind_is_set_aside_and_put_back() -> None:
    class Keeping(nn.Module):
        def __init__(self, value: object) -> None:
            super().__init__()
            self.value = value

        def get_extra_state(self) -> Any:
            return self.value

        def set_extra_state(self, state: Any) -> None:
            self.value = state

    class Mute(nn.Module):
        def get_extra_state(self) -> int:
            return 1

    grown = torch.ones(2, requires_grad=True) * 2  # Which copy.deepcopy refuses.
    values: list[Any] = [None, 7, b"ab", ("a", [1]), {"amax": grown, 3: {"of": None}}, io.BytesIO(b"fp8")]
    model = nn.Sequential(*map(Keeping, values), Mute(), nn.Linear(2, 2))
    kept = forward_state.keep(model)
    with torch.no_grad():
        grown.zero_()
    values[5].write(b"other")
    for module in model:
        module.value = "changed"
    for _ in range(2):
        forward_state.put_back(model, kept)
        found = [module.value for module in model]
        assert found[:4] == values[:4]
        assert found[4]["amax"].tolist() == [2, 2]
        assert found[4][3] == {"of": None}
        assert found[5].getvalue() == b"fp8"
        assert found[6] == "changed", "what cannot be set is let be"
        found[5].write(b"other")
        found[4]["amax"].zero_()
        found[4][3].clear()
