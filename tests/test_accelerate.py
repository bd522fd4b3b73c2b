"""Loops with accelerate: its wrappers are registered as they are, and its loaders and accumulation resume exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from in_process import Attempts
from support import PROGRAMS, Ended, assert_resumed, column, event, launch, losses, weights
from torch import nn
from torch.utils.data import DataLoader

from trainer import SpotRun
from trainer.errors import RunError
from trainer.training import accelerate_loader, accelerate_state
from trainer.training.registered import Registered

SCRIPT = PROGRAMS / "accelerated.py"


def run(run_dir: Path, *args: object, processes: int = 2) -> Ended:
    return launch(SCRIPT, "--dir", run_dir, *args, processes=processes)


def both(tmp_path: Path, *args: object, strikes: tuple[str, ...], processes: int = 2) -> tuple[Path, Path]:
    """The folders of a run that nothing strikes, and of one that is struck at these steps."""
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    done = run(whole, *args, processes=processes)
    assert done.code == 0, done.output
    for strike in strikes:
        ended = run(struck, *args, "--strike", strike, processes=processes)
        assert ended.code == 75, ended.output
    done = run(struck, *args, processes=processes)
    assert done.code == 0, done.output
    assert "after the block: step 12" in done.output
    assert_resumed(struck)
    return whole, struck


def same(whole: Path, struck: Path) -> None:
    assert sorted(losses(whole)) == list(range(1, 13))
    assert losses(struck) == losses(whole)
    assert column(struck, "lr") == column(whole, "lr")
    assert weights(struck) == weights(whole)


# 26 items on two ranks: 4 batches of 4 each in an epoch, so that accelerate ends a step early at its end.
@pytest.mark.slow
def test_accumulation_on_two_ranks_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, struck = both(tmp_path, "--accumulate", 3, strikes=("8:SIGTERM",))
    same(whole, struck)
    assert event(struck, "restored")["step"] == 8
    assert {name.split(".")[0] for name in weights(whole)} == {"first", "last"}  # Without `module.`.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "args", "strikes"),
    [
        (2, ["--accumulate", 3], ("5:SIGKILL", "8:SIGTERM")),
        (1, ["--accumulate", 2, "--scale", 2.0**127], ("5:SIGKILL", "8:SIGTERM")),
        (2, ["--precision", "bf16", "--late", "--loader", '{"split_batches": true}'], ("8:SIGTERM",)),
        (2, ["--wrap", "fsdp", "--loader", '{"dispatch_batches": true}'], ("8:SIGTERM",)),
        (2, ["--wrap", "plugin", "--accumulate", 3], ("8:SIGTERM",)),
        (2, ["--wrap", "plugin", "--accumulate", 3, "--no-time"], ("5:SIGTERM", "9:SIGTERM")),
        (3, ["--width", 600], ("8:SIGTERM",)),  # Several buckets of gradients.
    ],
    ids=["accumulate", "scaler", "bf16", "fsdp", "plugin", "dropped", "buckets"],
)
def test_other_settings_end_with_the_same_bits(
    tmp_path: Path, processes: int, args: list[object], strikes: tuple[str, ...]
) -> None:
    whole, struck = both(tmp_path, *args, strikes=strikes, processes=processes)
    same(whole, struck)
    assert ("--no-time" in args) == (event(struck, "restored")["step"] == int(strikes[-1][0]) - 1)
    if "--scale" in args:
        assert 0 < sum(map(int, map(str, column(whole, "skipped")))) < 12
        lost = run(tmp_path / "lost", *args, "--forgets", processes=1)
        assert "Error: register(optimizer=...): its gradient scaler would be lost. Register it too" in lost.output
        assert lost.code == 1


@pytest.mark.slow
def test_what_one_wrapper_saved_is_restored_into_any_other(tmp_path: Path) -> None:
    saved = ""
    for processes, wrap in [(2, "ddp"), (2, "fsdp"), (1, "compiled"), (2, "fsdp")]:
        done = launch(PROGRAMS / "rewrapped.py", "--dir", tmp_path / "run", wrap, processes=processes)
        assert done.code == 0, done.output
        found = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
        restored = {line["restored"] for line in found if "restored" in line}
        assert restored == ({saved} if saved else set()), wrap
        [saved] = {line["saved"] for line in found if "saved" in line}


@pytest.mark.slow
def test_a_prepared_loader_continues_after_any_batch(tmp_path: Path) -> None:
    done = launch(PROGRAMS / "prepared.py", "--dir", tmp_path, processes=2)
    assert done.code == 0, done.output
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert [name for name, case in found.items() if case["wrong"]] == []
        assert all(any(case["ends"][:-3]) for case in found.values())  # An epoch has ended.
        assert found["shards"]["loaded"] == 2 * 4  # Of those that were skipped, none was loaded.


@pytest.mark.parametrize(
    ("samples", "even", "split", "counts"),
    [(20, False, False, [3, 2]), (20, True, False, []), (16, False, False, [2, 2]), (18, False, True, [5, 4]),
     (19, False, True, [5, 5])],
)  # fmt: skip
def test_ranks_with_other_numbers_of_batches_are_found(
    samples: int, even: bool, split: bool, counts: list[int]
) -> None:
    options = {"even_batches": even, "split_batches": split, "num_processes": 2}
    loader = DataLoader(range(samples), batch_size=4)  # type: ignore[arg-type]
    loaders = [prepare_data_loader(loader, process_index=rank, **options) for rank in range(2)]
    found = [accelerate_loader.lengths(loader) for loader in loaders]
    assert found == [counts, counts]
    assert not counts or [len(list(loader)) for loader in loaders] == counts


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"even_batches": False}, "the ranks have different numbers of batches in an epoch (3, 2), because of even_b"),
        ({"use_stateful_dataloader": True}, "use_stateful_dataloader=True of accelerate does not resume exactly. Lea"),
    ],
    ids=["even_batches", "use_stateful_dataloader"],
)
def test_a_prepared_loader_that_would_not_resume_exactly_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], option: dict[str, bool], message: str
) -> None:
    def script(run: SpotRun, _: object) -> None:
        run.register(model=nn.Linear(1, 1))
        loader = DataLoader(range(20), batch_size=4)  # type: ignore[arg-type]
        prepared = prepare_data_loader(loader, num_processes=2, process_index=0, **option)
        for _ in run.steps(prepared, until=3):
            raise AssertionError("not refused")

    assert Attempts(tmp_path / "run").one(script) == 1
    errors = capfd.readouterr().err
    assert errors.startswith(f"Error: {message}"), errors
    assert errors.count("\n") == 1


def test_what_would_train_apart_or_lose_names_is_refused() -> None:
    PartialState(cpu=True)
    with pytest.raises(RunError, match=r"there are 2 processes, but Accelerator counts 1\. Without a GPU it needs"):
        accelerate_state.refuse_other_processes(2)
    for name, known_as in [("FullyShardedDataParallel", "FSDP1"), ("DeepSpeedEngine", "DeepSpeed")]:
        flattened = type("Derived", (type(name, (nn.Linear,), {}),), {})(2, 1)
        with pytest.raises(RunError, match=rf"register\(model=...\): {name} \({known_as}\) cannot be saved"):
            Registered(True, {}).add({"model": nn.Sequential(flattened)})
    loader = prepare_data_loader(DataLoader(range(4)))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"register\(loader=...\): a loader that accelerate has prepared is not regis"):
        Registered(True, {}).add({"loader": loader})
