"""--micro-batch-size auto: found by trying, halved on all ranks where memory runs out, and the global batch holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import PROGRAMS, Ended, column, event, launch, losses

from trainer.errors import RunError
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_checkpoints
from trainer.training import micro_batch


def attempt(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    return launch(PROGRAMS / "small_memory.py", "--dir", run_dir, *args, processes=processes)


def saved_with(run_dir: Path) -> dict[int, object]:
    """The micro-batch in each checkpoint's manifest, by step."""
    paths = RunPaths(run_dir)
    manifests = [read_manifest(paths.checkpoint(name)) for name in list_checkpoints(paths)]
    return {manifest.step: manifest.facts["config"]["micro_batch_size"] for manifest in manifests}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_size_is_found_and_all_ranks_take_the_least(tmp_path: Path, ranks: int) -> None:
    ended = attempt(tmp_path / "auto", "--fits", 2, "--rank", ranks - 1, processes=ranks)
    assert ended.code == 0, ended.output
    assert "Micro-batch: 2 samples (4 do not fit into memory); 12 in a step, as ever." in ended.output
    assert attempt(tmp_path / "given", "--micro", 2, processes=ranks).code == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
    assert set(saved_with(tmp_path / "auto").values()) == {2}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_in_which_memory_runs_out_is_done_again_on_all_ranks(tmp_path: Path, ranks: int, place: str) -> None:
    small = ["--fits", 2, "--since", 4, "--rank", ranks - 1, "--place", place]
    ended = attempt(tmp_path / "auto", *small, processes=ranks)
    assert ended.code == 0, ended.output
    assert ended.output.count("step 5: out of memory with a micro-batch of 4; done again with 2") == 1
    # The same as where the size was given: 4 to the checkpoint of step 4, and 2 from there.
    for micro, steps in ((4, 4), (2, 8)):
        assert attempt(tmp_path / "given", "--micro", micro, "--steps", steps, processes=ranks).code == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
    assert column(tmp_path / "auto", "order") == column(tmp_path / "given", "order"), "the same samples"
    assert saved_with(tmp_path / "auto") == {4: 4, 8: 2}


def test_where_the_gradients_sum_has_begun_the_next_attempt_halves(tmp_path: Path) -> None:
    # Layers of more than a megabyte each have buckets of their own: the sum of the later ones is under way.
    small = ["--fits", 2, "--since", 6, "--rank", 1, "--place", "middle", "--hidden", 600]
    ended = attempt(tmp_path, *small, processes=2)
    assert ended.code == 75, ended.output
    assert "out of memory with a micro-batch of 4, while the gradients were summed" in ended.output
    assert event(tmp_path, "end")["micro_batch_too_large"] == 4
    again = attempt(tmp_path, *small, processes=2)
    assert again.code == 0, again.output
    assert "Micro-batch: 2 samples" in again.output
    assert list(losses(tmp_path)) == list(range(1, 9))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_where_the_optimizer_has_begun_the_next_attempt_halves(tmp_path: Path, ranks: int) -> None:
    """Parameters have changed on some ranks, so the step cannot be done again."""
    small = ["--fits", 2, "--since", 6, "--rank", ranks - 1, "--place", "update"]
    ended = attempt(tmp_path / "auto", *small, processes=ranks)
    assert ended.code == 75, ended.output
    assert "out of memory with a micro-batch of 4, in the optimizer's step. The next attempt begins with half" in (
        ended.output
    )
    assert "Traceback" not in ended.output
    assert event(tmp_path / "auto", "end")["micro_batch_too_large"] == 4
    again = attempt(tmp_path / "auto", *small, processes=ranks)
    assert again.code == 0, again.output
    assert "Micro-batch: 2 samples" in again.output
    for micro, steps in ((4, 4), (2, 8)):
        assert attempt(tmp_path / "given", "--micro", micro, "--steps", steps, processes=ranks).code == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")


def test_a_resume_on_the_same_machines_takes_the_size_of_its_checkpoint(tmp_path: Path) -> None:
    assert attempt(tmp_path, "--steps", 4, "--fits", 2).code == 0
    resumed = attempt(tmp_path)
    assert resumed.code == 0, resumed.output
    assert "Micro-batch: 2 samples (as before)" in resumed.output
    assert "Changed since" not in resumed.output


def test_a_device_with_less_memory_takes_fewer_samples_and_the_global_batch_holds(tmp_path: Path) -> None:
    assert attempt(tmp_path, "--steps", 4, "--device", "large").code == 0
    moved = attempt(tmp_path, "--device", "small", "--fits", 3)
    assert moved.code == 0, moved.output
    assert "Micro-batch: 3 samples (6 do not fit into memory); 12 in a step, as ever." in moved.output
    assert "Changed since step 4: micro-batch size 12 -> 3, device large -> small." in moved.output
    assert saved_with(tmp_path) == {4: 12, 8: 3}
    assert list(losses(tmp_path)) == list(range(1, 9))


def test_memory_for_no_sample_is_said_in_a_line(tmp_path: Path) -> None:
    ended = attempt(tmp_path, "--fits", 0)
    assert ended.code == 1
    assert "Error: out of memory with a micro-batch of one sample." in ended.output
    assert "Traceback" not in ended.output


def test_a_size_that_was_given_stays(tmp_path: Path) -> None:
    ended = attempt(tmp_path, "--micro", 4, "--fits", 2)
    assert ended.code == 1
    assert "OutOfMemoryError" in ended.output
    assert "--micro-batch-size auto" in ended.output


FACTS = {"config": {"micro_batch_size": 6}, "machine": {"device": "A100"}, "world_size": 2}


@pytest.mark.parametrize(
    ("device", "ranks", "facts", "too_large", "expected"),
    [
        ("A100", 2, {}, None, [12, 0]),
        ("A100", 5, {}, None, [4, 0]),
        ("cpu", 1, {}, None, [4, 0]),
        ("A100", 2, FACTS, None, [6, 1]),
        ("A100", 4, FACTS, None, [6, 0]),
        ("V100", 2, FACTS, None, [12, 0]),
        ("A100", 2, FACTS, 6, [3, 0]),
        ("V100", 2, FACTS, 24, [12, 0]),
    ],
)
def test_where_the_search_begins(device, ranks, facts, too_large, expected) -> None:
    assert micro_batch.first_size(24, ranks, device, facts, too_large) == expected


def test_sizes_divide_the_global_batch() -> None:
    assert [micro_batch.smaller(30, size) for size in (30, 15, 6, 3)] == [15, 6, 3, 1]
    with pytest.raises(RunError, match="one sample"):
        micro_batch.smaller(30, 1)
