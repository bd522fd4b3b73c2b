"""A run that is preempted ends bit-identical to one that is not; and each rule that makes it so is needed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Ended, clean_env, column, event, history, losses, mlp, weights

from trainer.layout.names import RunPaths, list_checkpoints

# 12 steps of 12 samples over 60 samples: an epoch is 5 steps, so there are more than two; a save every 4 steps.
PREEMPTIONS = [
    ("kill@2",),  # before the first checkpoint
    ("kill@9",),  # the epoch's last step (steps 6 to 10), after a resume from the start
    ("sigterm@9",),  # within three steps of a resume from step 8
    ("save:share-half@1",),  # in the last save
    ("kill@11",),
]


def finish(
    run_dir: Path, *args: object, processes: int, faults: list[tuple[str, ...]], env: dict[str, str] | None = None
) -> list[Ended]:
    """Run one attempt per fault, then one to the end."""
    ended = []
    for fault in faults:
        flags = [part for what in fault for part in ("--fault", what)]
        ended.append(mlp(run_dir, *args, *flags, processes=processes, env=env))
        assert ended[-1].code != 0, ended[-1].output
    ended.append(mlp(run_dir, *args, processes=processes, env=env))
    assert ended[-1].code == 0, ended[-1].output
    return ended


def assert_identical(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    for key in ("lr", "order", "rng", "grad_norm", "samples", "tokens"):
        assert column(one, key) == column(other, key), key
    assert weights(one)
    assert weights(one) == weights(other)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_a_preempted_run_is_bit_identical_to_an_undisturbed_one(
    tmp_path: Path, undisturbed: Callable[[int], Path], processes: int
) -> None:
    whole, broken = undisturbed(processes), tmp_path / "broken"
    finish(broken, processes=processes, faults=PREEMPTIONS if processes < 3 else PREEMPTIONS[1:4])
    assert sorted(losses(whole)) == list(range(1, 13))
    assert_identical(whole, broken)


def test_a_preempted_run_with_two_threads_is_bit_identical_to_an_undisturbed_one(tmp_path: Path) -> None:
    """The processes of all other tests have one thread each."""
    whole, broken, env = tmp_path / "whole", tmp_path / "broken", clean_env(OMP_NUM_THREADS="2")
    finish(whole, processes=1, faults=[], env=env)
    finish(broken, processes=1, faults=PREEMPTIONS[2:3], env=env)
    assert_identical(whole, broken)


# Between two steps; while a save is written; while one is read back, which hangs; while the model is evaluated.
@pytest.mark.parametrize(
    ("when", "more"),
    [
        ("sigterm@6", ()),
        ("sigterm:share-half@1", ()),
        ("sigterm:read-back@1", ("--hang-in-read-back", "--slow", 0.05)),
        ("sigterm:eval@6", ("--eval-every", 3)),
    ],
)
def test_sigterm_loses_no_step(tmp_path: Path, when: str, more: tuple[object, ...]) -> None:
    run_dir = tmp_path / "run"
    stopped = mlp(run_dir, *more, "--fault", when)
    assert stopped.code == 75, stopped.output
    ended = event(run_dir, "end")
    assert ended["cause"] == "signal"
    assert ended["committed_step"] == ended["step"] >= 4  # type: ignore[operator]
    assert mlp(run_dir).code == 0
    assert event(run_dir, "restored")["step"] == ended["step"]
    assert event(run_dir, "restored")["lost_steps"] == 0
    assert event(run_dir, "first-step")["step"] == int(str(ended["step"])) + 1


def test_a_sigterm_between_new_weights_and_the_end_of_their_step_saves_a_whole_step(
    tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    """The handler only notes it: a save within it would have the weights of a step that is not yet counted."""
    run_dir = tmp_path / "run"
    assert mlp(run_dir, "--fault", "sigterm:optimizer@6").code == 75
    ended = event(run_dir, "end")
    assert ended["committed_step"] == ended["step"] > 6  # type: ignore[operator]
    assert mlp(run_dir).code == 0
    assert_identical(undisturbed(1), run_dir)


# What each rule guards, as the first column of the metrics in which its absence shows.
@pytest.mark.parametrize(
    ("rule", "processes", "shows_in"),
    [("order", 1, "order"), ("lr", 1, "lr"), ("throw-away", 3, "grad_norm")],
)
def test_without_this_rule_a_resume_is_not_exact(tmp_path: Path, rule: str, processes: int, shows_in: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # More than 1 MB of parameters: DistributedDataParallel makes more than one bucket of them.
    # With a save each second step the one of step 2 is committed at the kill: that of step 4 has waited for it.
    size = ("--hidden", 512, "--save-every", 2) if rule == "throw-away" else ("--commit-first",)
    finish(whole, *size, "--without", rule, processes=processes, faults=[])
    finish(broken, *size, "--without", rule, processes=processes, faults=[("kill@6",)])
    assert column(whole, shows_in) != column(broken, shows_in)
    assert weights(whole) != weights(broken)


def test_without_random_numbers_per_micro_step_another_world_size_trains_on_other_ones(tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    finish(whole, "--without", "rng", processes=1, faults=[])
    assert mlp(moved, "--without", "rng", "--fault", "kill@6", "--commit-first").code != 0
    assert mlp(moved, "--without", "rng", processes=2).code == 0
    assert losses(moved)[12] != pytest.approx(losses(whole)[12], rel=1e-3)


def test_with_the_throw_away_pass_a_model_of_several_buckets_resumes_exactly(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(whole, "--hidden", 512, processes=3, faults=[])
    finish(broken, "--hidden", 512, processes=3, faults=[("kill@6",)])
    assert_identical(whole, broken)


def test_another_world_size_trains_on_the_same_samples_at_the_same_rate(tmp_path: Path, whole: Path) -> None:
    moved = tmp_path / "moved"
    assert mlp(moved, "--fault", "kill@5", "--commit-first").code != 0
    assert mlp(moved, "--fault", "kill@9", "--commit-first", processes=3).code != 0
    assert mlp(moved, processes=2).code == 0
    assert column(moved, "world_size") == [1] * 4 + [3] * 4 + [2] * 4
    for key in ("order", "lr", "rng", "samples", "tokens"):
        assert column(whole, key) == column(moved, key), key
    for step, loss in losses(whole).items():
        assert losses(moved)[step] == pytest.approx(loss, rel=1e-5)


def test_an_evaluation_that_a_preemption_cuts_off_is_made_up_for(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(whole, "--eval-every", 3, processes=1, faults=[])
    finish(broken, "--eval-every", 3, processes=1, faults=[("kill@5",), ("sigterm@9",)])
    assert [line["step"] for line in history(whole) if "eval_loss" in line] == [3, 6, 9, 12]
    evaluations, again = (
        [(line["step"], line["eval_loss"]) for line in history(run) if "eval_loss" in line] for run in (whole, broken)
    )
    assert again == evaluations


@pytest.mark.slow
def test_a_step_that_does_not_fit_the_grace_is_dropped_and_its_boundary_saved(tmp_path: Path) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    small = ("--steps", 4, "--micro", 2, "--batch-norm")
    assert mlp(whole, *small).code == 0
    # A step is 6 micro-steps of 0.8 s; when the word comes, in the first of them, 4 s are left.
    stopped = mlp(run_dir, *small, "--slow", 0.8, "--fault", "sigterm@1", grace=4)  # The launcher's.
    assert stopped.code == 75, stopped.output
    end = event(run_dir, "end")
    assert (end.get("step"), end.get("committed_step")) == (1, 1), stopped.output
    assert mlp(run_dir, *small).code == 0
    assert event(run_dir, "restored")["lost_steps"] == 0
    assert_identical(whole, run_dir)


def test_every_rank_evaluates_the_model_that_would_be_saved(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = ("--batch-norm", "--eval-every", 4)
    finish(whole, *args, processes=2, faults=[])
    # Taken in the evaluation of the very step that it is resumed at: its buffers are rank 0's everywhere then.
    finish(broken, *args, "--commit-first", processes=2, faults=[("kill:eval@8",)])
    assert event(broken, "restored")["step"] == 8
    evaluations = [[line["eval_loss"] for line in history(one) if "eval_loss" in line] for one in (whole, broken)]
    assert len(evaluations[0]) == 3
    assert evaluations[0] == evaluations[1]
    assert_identical(whole, broken)


def test_a_stop_in_the_last_step_costs_neither_the_last_evaluation_nor_another_attempt(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert mlp(run_dir, "--eval-every", 4, "--fault", "sigterm@11").code == 0
    assert [line["step"] for line in history(run_dir) if "eval_loss" in line] == [4, 8, 12]


def test_a_step_that_overflows_half_precision_counts_and_is_resumed_over_exactly(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = ("--precision", "fp16", "--overflow-at", 5)
    finish(whole, *args, processes=1, faults=[])
    finish(broken, *args, "--commit-first", processes=1, faults=[("kill@7",), ("sigterm@9",)])
    assert column(whole, "grad_norm")[5] is None, "the scaler skips it"
    assert sorted(losses(whole)) == list(range(1, 13))
    assert_identical(whole, broken)
    # A scale is a power of two, so that another one often shows nowhere else.
    scaler = [json.loads((newest(one) / "state.json").read_text())["counters"] for one in (whole, broken)]
    assert "32768.0" in str(scaler[0])
    assert scaler[0] == scaler[1]


def newest(run_dir: Path) -> Path:
    return RunPaths(run_dir).checkpoint(list_checkpoints(RunPaths(run_dir))[0])


def test_a_learning_rate_that_may_change_changes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert mlp(run_dir, "--fault", "sigterm@6").code == 75
    refused = mlp(run_dir, "--lr", 0.02)
    assert refused.code == 1
    assert "lr=0.01" in refused.output
    assert mlp(run_dir, "--lr", 0.02, "--allow", "lr", "--fault", "sigterm@9").code == 75
    assert mlp(run_dir, "--lr", 0.02, "--allow", "lr").code == 0
    step = int(str(event(run_dir, "restored", attempt=2)["step"]))
    factors = [1 - number / 13 for number in range(1, 13)]
    expected = [(0.01 if number < step else 0.02) * factor for number, factor in enumerate(factors)]
    assert column(run_dir, "lr") == pytest.approx(expected)


def test_bf16_resumes_exactly(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(whole, "--precision", "bf16", processes=1, faults=[])
    finish(broken, "--precision", "bf16", processes=1, faults=[("kill@6",)])
    assert_identical(whole, broken)
