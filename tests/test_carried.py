"""What goes on across a change between attempts: the samples consumed, the data, the names that may change."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import one_rank
import pytest
import torch
from support import column, event, history
from torch import nn

from trainer.finetune.config import parse
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_checkpoints
from trainer.training.config import ConfigError
from trainer.training.order import sample_ids

SEED = 0


class Stopping(one_rank.Numbers):
    """Samples that end the attempt at the n-th batch, once something is committed."""

    def __init__(self, run_dir: Path, count: int, last: int) -> None:
        super().__init__(count)
        self.run_dir, self.last = run_dir, last

    def batch(self, ids: np.ndarray) -> torch.Tensor:
        if len(self.asked) == self.last:
            end = time.monotonic() + 60
            while not any(self.run_dir.glob("checkpoints/*/MANIFEST.json")):
                assert time.monotonic() < end, "nothing is committed"
                time.sleep(0.01)
            raise ValueError("taken")
        return super().batch(ids)


@pytest.mark.parametrize("after", [16, 4])
def test_another_global_batch_size_goes_on_where_the_samples_were_consumed_to(tmp_path: Path, after: int) -> None:
    run_dir = tmp_path / "run"
    options = {"micro_batch_size": 4, "max_steps": 14, "save_interval_steps": 9}
    # The throw-away pass, nine steps of two micro-steps, one step that is fetched ahead.
    one_rank.train(run_dir, samples=Stopping(run_dir, 100, 21), global_batch_size=8, **options)
    second = one_rank.Numbers(100)
    changed = {"global_batch_size": after, "allow_config_change": ("global_batch_size",)}
    assert one_rank.train(run_dir, samples=second, **options, **changed).code == 0
    assert event(run_dir, "restored")["samples"] == 72
    seen = [number for batch in second.asked[1:] for number in batch]
    assert seen == list(sample_ids(SEED, 100, 72, 72 + 5 * after)), "each sample once an epoch, whatever the batch size"
    assert column(run_dir, "samples")[8:] == [72 + after * step for step in range(6)]
    newest = read_manifest(RunPaths(run_dir).checkpoint(list_checkpoints(RunPaths(run_dir))[0]))
    assert newest.facts["samples"] == 72 + 5 * after
    # And a third attempt goes on from there.
    third = one_rank.Numbers(100)
    more = {**options, "max_steps": 15, "global_batch_size": after, "allow_config_change": ("max_steps",)}
    assert one_rank.train(run_dir, samples=third, **more).code == 0
    seen = [number for batch in third.asked[1:] for number in batch]
    assert seen == list(sample_ids(SEED, 100, 72 + 5 * after, 72 + 6 * after))


def test_a_data_set_whose_length_changed_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert one_rank.train(run_dir, samples=Stopping(run_dir, 60, 10)).code == 1
    refused = one_rank.train(run_dir, samples=one_rank.Numbers(61))
    assert (refused.code, refused.cause) == (1, "refused")
    assert "60" in str(refused.error)
    assert "61" in str(refused.error)
    assert "--allow-config-change n_samples" in str(refused.error)
    assert one_rank.train(run_dir, samples=one_rank.Numbers(61), allow_config_change=("n_samples",)).code == 0


def test_a_float_weight_counts_as_it_is(tmp_path: Path) -> None:
    options = {"global_batch_size": 4, "micro_batch_size": 1}
    for name, weigh in (("tenths", lambda batch: 0.6), ("ones", lambda batch: torch.tensor(1))):
        left = one_rank.train(tmp_path / name, samples=one_rank.Numbers(weigh=weigh), **options)
        assert left.code == 0, left.error
    assert column(tmp_path / "tenths", "tokens") == [2.4] * 6
    assert column(tmp_path / "ones", "tokens") == [4] * 6
    first, second = (column(tmp_path / name, "loss")[0] for name in ("tenths", "ones"))
    assert first == pytest.approx(second / 0.6)  # type: ignore[operator]


@pytest.mark.parametrize("weight", [-1, float("nan"), "many"])
def test_a_weight_that_is_none_is_said(tmp_path: Path, weight: object) -> None:
    left = one_rank.train(tmp_path / "run", samples=one_rank.Numbers(weigh=lambda batch: weight))
    assert left.code == 1
    assert "weight()" in str(left.error)


def test_a_wrong_name_of_what_may_change_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'max_step'.*Did you mean 'max_steps'"):
        parse(["--checkpoint-dir", "x", "--allow-config-change", "max_step"])
    assert parse(["--checkpoint-dir", "x", "--allow-config-change", "data_key"]).allow_config_change == ("data_key",)
    run_dir = tmp_path / "run"
    left = one_rank.train(run_dir, allow_config_change=("max_steps", "widht"), binding={"width": 3})
    assert left.code == 1
    assert "'widht'" in str(left.error)
    assert "Did you mean 'width'" in str(left.error)

    def later(run: one_rank.InProcess) -> None:
        run.bind(corpus="c")

    assert (
        one_rank.train(run_dir, allow_config_change=("corpus", "width"), binding={"width": 4}, before=later).code == 0
    )


def test_another_precision_or_processor_is_said_at_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert one_rank.train(run_dir, samples=Stopping(run_dir, 60, 10)).code == 1
    assert one_rank.train(run_dir, samples=Stopping(run_dir, 60, 4)).code == 1
    assert "bit-identical" not in capsys.readouterr().out
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ODD")
    old = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.9.9+odd")
    assert one_rank.train(run_dir, precision="bf16").code == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "bit-identical" in line]
    for what in ("precision fp32 -> bf16", "ODD", f"torch {old} -> 9.9.9+odd"):
        assert what in line
    assert "threads" not in line, "the first attempt's number is set again"


def test_a_number_of_numpy_is_saved_as_a_number(tmp_path: Path) -> None:
    class Best:
        value: object = 1.0

        def state_dict(self) -> dict[str, object]:
            return {"best": self.value}

        def load_state_dict(self, saved: dict[str, object]) -> None:
            self.value = saved["best"]

    best = Best()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        best.value = np.float64(0.25)  # A metric's type, from the second step on.
        return one_rank.squares(model, batch)

    run_dir = tmp_path / "run"
    assert one_rank.train(run_dir, loss=loss, extra={"best": best}, samples=Stopping(run_dir, 60, 10)).code == 1
    assert list_checkpoints(RunPaths(run_dir)), "the save has not failed"
    again = Best()
    assert one_rank.train(run_dir, extra={"best": again}).code == 0
    assert again.value == 0.25
    assert type(again.value) is np.float64
    assert [line["step"] for line in history(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_value_that_can_be_saved_no_more_ends_the_run_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 1, which nobody starts again by itself."""
    when: list[object] = []

    class Late:
        def state_dict(self) -> dict[str, object]:
            return {"when": when[-1] if when else None}

        def load_state_dict(self, saved: dict[str, object]) -> None:
            """Nothing."""

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if model.training and len(asked.asked) > 8:
            when.append(threading.Lock())
        return one_rank.squares(model, batch)

    asked = one_rank.Numbers()
    left = one_rank.train(tmp_path / "run", loss=loss, extra={"late": Late()}, samples=asked)
    assert left.code == 1
    assert "extra.late.when: a lock cannot be saved" in str(left.error)
    assert "Traceback" not in capsys.readouterr().err


def test_what_binds_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert one_rank.train(run_dir, binding={"width": np.int64(3), "rate": np.float32(0.5)}).code == 0
    start = json.loads(next((run_dir / "attempts").glob("*/0001-start.json")).read_text())
    assert start["binding"] == {"width": 3, "rate": 0.5}
    left = one_rank.train(tmp_path / "other", binding={"width": {1, 2}})
    assert left.code == 1
    assert "width" in str(left.error)
