"""Losses, gradients and weights that are not finite: said, stopped for or skipped, and no state to go on from."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import one_rank
import pytest
import torch
import torch.distributed as dist
from support import event, history, weights
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer.checkpoint.finite import is_spoilt, watched
from trainer.layout.events import read_progress
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_attempts, list_checkpoints
from trainer.training import finite


def poisoned(steps: Callable[[int], bool], by: float = math.nan) -> dict[str, object]:
    """Options of `one_rank.train`: the loss of some steps, counted from 1, is multiplied."""
    runs: list[one_rank.InProcess] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        total = one_rank.squares(model, batch)
        return total * by if steps(runs[0].steps_done + 1) and runs[0].journal else total

    return {"loss": loss, "before": runs.append}


def saved(run_dir: Path) -> dict[int, bool]:
    """The steps of the checkpoints that are there, oldest first, and whether they say that they are finite."""
    paths = RunPaths(run_dir)
    names = sorted(list_checkpoints(paths))
    return {name.step: read_manifest(paths.checkpoint(name)).facts["finite"] for name in names}


def test_three_steps_in_a_row_stop_the_run_and_a_relaunch_goes_on_from_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    left = one_rank.train(run_dir, max_steps=12, **poisoned(lambda step: step >= 6))
    said = "".join(capsys.readouterr())
    assert left.code == 1, left.error
    assert re.findall(r"step (\d+): the loss is not finite", said) == ["6", "7", "8", "8"], "the last in the error too"
    assert "0000000004-" in str(left.error), "the last finite checkpoint is named"
    assert "Traceback" not in said
    assert event(run_dir, "end")["step"] == 8
    assert saved(run_dir) in ({2: True, 4: True, 6: False}, {2: True, 4: True, 6: False, 8: False})
    assert one_rank.train(run_dir, max_steps=12).code == 0
    said = "".join(capsys.readouterr())
    assert "resumed at step 4" in said
    assert "not finite" in said, "what is passed by is said"
    whole = tmp_path / "whole"
    assert one_rank.train(whole, max_steps=12).code == 0
    assert weights(run_dir) == weights(whole)


def test_a_step_or_two_that_heal_stop_nothing(tmp_path: Path) -> None:
    """An infinite loss whose gradients are finite: the weights stay numbers."""
    runs: list[one_rank.InProcess] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        total = one_rank.squares(model, batch)
        return total + math.inf if runs[0].steps_done % 3 else total

    assert one_rank.train(tmp_path / "run", max_steps=9, loss=loss, before=runs.append).code == 0


def test_steps_in_a_row_are_counted_over_a_resume(tmp_path: Path) -> None:
    runs: list[one_rank.InProcess] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        total = one_rank.squares(model, batch)
        return total + math.inf if runs[-1].steps_done >= 2 else total

    options = {"loss": loss, "before": runs.append, "allow_config_change": ("max_steps",)}
    assert one_rank.train(tmp_path / "run", max_steps=4, **options).code == 0
    assert one_rank.train(tmp_path / "run", max_steps=9, **options).code == 1
    assert event(tmp_path / "run", "end")["step"] == 5, "the third"


def test_a_run_that_ends_before_the_third_is_not_finished(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    left = one_rank.train(run_dir, max_steps=7, **poisoned(lambda step: step >= 6))
    assert left.code == 1
    assert not (run_dir / "final" / "MANIFEST.json").exists()
    assert one_rank.train(run_dir, max_steps=7).code == 0


def test_ignore_is_said_once_and_neither_prunes_the_last_finite_ones_nor_piles_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_rank.pruned_before_the_next_save(monkeypatch)
    run_dir = tmp_path / "run"
    options = {"max_steps": 16, "save_interval_steps": 1, "keep_latest": 2, "on_nan": "ignore"}
    assert one_rank.train(run_dir, **options, **poisoned(lambda step: step >= 7)).code == 0
    assert "".join(capsys.readouterr()).count("not finite") == 1
    assert saved(run_dir) == {5: True, 6: True, 15: False, 16: False}


def test_what_ignores_resumes_from_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    one_rank.train(run_dir, max_steps=4, on_nan="ignore", **poisoned(lambda step: step >= 3))
    allowed = {"max_steps": 6, "allow_config_change": ("max_steps",)}
    one_rank.train(run_dir, on_nan="ignore", **allowed)
    assert "resumed at step 4" in capsys.readouterr().out


class Normed(nn.Sequential):
    """A model with a buffer that a forward pass over what is no number spoils."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm1d(4), nn.Linear(4, 1))


def test_skip_drops_the_update_and_counts_it_and_resumes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def adam(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01)  # type: ignore[arg-type]

    class Spoilt(one_rank.Numbers):
        def batch(self, ids: object) -> torch.Tensor:
            found = super().batch(ids)  # type: ignore[arg-type]
            return found * math.nan if 13 in ids else found  # type: ignore[operator]

    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    options = {"model": Normed, "optimizer": adam, "on_nan": "skip", "max_steps": 20, "save_interval_steps": 5}
    assert one_rank.train(whole, samples=Spoilt(20), **options).code == 0
    lines = history(whole)
    dropped = [line["step"] for line in lines if line["loss"] is None]
    assert len(dropped) == 4, "one in each epoch"
    assert all(math.isfinite(value) for value in torch.frombuffer(
        bytearray(b"".join(data for name, data in weights(whole).items() if "tracked" not in name)),
        dtype=torch.float32))  # fmt: skip
    assert lines[-1]["skipped"] == 4
    assert event(whole, "end")["skipped"] == 4
    (only,) = list_attempts(RunPaths(whole))
    assert read_progress(RunPaths(whole), only)["skipped"] == 4
    assert f"step {dropped[0]}" in capsys.readouterr().out

    class Broken(Spoilt):
        def batch(self, ids: object) -> torch.Tensor:
            if len(self.asked) > 30:
                raise ValueError("taken")
            return super().batch(ids)

    assert one_rank.train(run_dir, samples=Broken(20), **options).code == 1
    assert one_rank.train(run_dir, samples=Spoilt(20), **options).code == 0
    assert weights(run_dir) == weights(whole)
    assert history(run_dir)[-1]["skipped"] == 4


def test_what_skips_already_is_not_told_to_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(finite.IN_A_ROW, finite.SKIP, 4)
    left = one_rank.train(tmp_path / "run", max_steps=12, on_nan="skip", **poisoned(lambda step: step >= 6))
    assert left.code == 1
    assert "step 9: the loss is not finite (nan), as in the 3 steps before" in str(left.error)
    assert "--on-nan" not in str(left.error)


def test_an_overflow_that_the_scaler_skips_is_none_of_these(tmp_path: Path) -> None:
    left = one_rank.train(
        tmp_path / "run", precision="fp16", max_steps=8, **poisoned(lambda step: 2 <= step <= 6, 1e34)
    )
    assert left.code == 0, left.error


@pytest.mark.parametrize("where", ["weight", "optimizer"])
def test_weights_that_are_no_numbers_though_the_loss_is_one_end_the_run(tmp_path: Path, where: str) -> None:
    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.spare = nn.Parameter(torch.zeros(3))
            self.fixed = nn.Parameter(torch.full((3,), -math.inf), requires_grad=False)

    made: list[Spare] = []
    runs: list[one_rank.InProcess] = []

    def model() -> Spare:
        made.append(Spare())
        return made[0]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 5 and where == "weight":
            made[0].spare.data.fill_(math.inf)
        if runs[0].steps_done == 5 and where == "optimizer":
            optimizers[0].state[made[0].weight]["momentum_buffer"].fill_(math.nan)
            optimizers[0].param_groups[0]["lr"] = 0.0
        return one_rank.squares(model, batch) + 0 * made[0].spare.nan_to_num(posinf=0).sum()

    optimizers: list[torch.optim.Optimizer] = []

    def sgd(parameters: object) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(parameters, lr=0.001, momentum=0.9))  # type: ignore[arg-type]
        return optimizers[0]

    run_dir = tmp_path / "run"
    left = one_rank.train(run_dir, model=model, optimizer=sgd, loss=loss, before=runs.append, max_steps=100)
    assert left.code == 1
    assert ("model.spare" if where == "weight" else "not finite") in str(left.error)
    assert "0000000004-" in str(left.error)
    assert left.error is not None


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_is_found_in_every_type_and_large_values_are_no_such(dtype: torch.dtype) -> None:
    large = torch.finfo(dtype).max
    fine = torch.tensor([large, large, -large, 0.0] * 100_000, dtype=torch.float64).to(dtype)
    assert not is_spoilt(fine)
    assert not is_spoilt(fine.reshape(4, -1).t(), infinite=False)
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        if math.isinf(value) and dtype == torch.float8_e4m3fn:
            continue  # It has none.
        spoilt = fine.clone()
        spoilt[-3] = torch.tensor(value).to(dtype)
        assert is_spoilt(spoilt)
        assert is_spoilt(spoilt, infinite=False) == math.isnan(value)
    assert not is_spoilt(torch.empty(0, dtype=dtype))
    assert not is_spoilt(torch.tensor([1, 2]))


def test_a_parameter_that_is_cut_over_ranks_is_watched_where_it_is_finite_at_the_start() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        model = nn.Linear(2, 3)
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        assert watched(model) == {"model.weight", "model.bias"}
        model.weight = nn.Parameter(distribute_tensor(torch.full((3, 2), math.nan), mesh, [Shard(0)]))
        assert watched(model) == {"model.bias"}
    finally:
        dist.destroy_process_group()
