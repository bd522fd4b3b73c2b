"""The tables of guarantees and launchers in README and docs/your-own-script.md: each entry names tests that show it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from support import PROGRAMS, REPO
from support_rehearse import is_exact, rehearse

from skyspot.rehearsal import levels

LEVELS = (
    "any command under the launcher",
    "`register`, `steps`",
    "the same, with `run.sampler`",
    "HF Trainer, TRL",
    "Lightning",
    "the bundled trainer",
)
"""The ways to train, in the order of the columns."""
OWN = "the command's own"


@dataclass(frozen=True)
class Cell:
    """What a way to train promises."""

    text: str
    tests: tuple[str, ...] = ()
    """Those that show it: `file::function`."""


def shown(text: str, *tests: str) -> Cell:
    return Cell(text, tests)


_COMMAND = "test_guarantees::test_a_command_under_the_launcher_keeps_what_it_saves_itself"
_REHEARSED = "test_examples::test_an_example_is_rehearsed"
_TRUTH = "test_rehearse_scripts::test_a_rehearsal_tells_the_truth_of_a_script"
_OWN_BITS = "test_own_loop::test_a_loop_of_ones_own_ends_with_the_same_bits_however_often_it_is_struck"
_SAMPLED = (
    "test_sampler::test_a_run_with_workers_stopped_by_a_signal_to_all_continues_on_two_processes_with_the_same_samples"
)
_SEEDED = (
    "test_sampler::test_items_that_draw_random_numbers_are_the_same_with_any_number_of_workers_and_after_any_resume"
)
_LIGHTNING = "test_lightning::test_a_training_ends_with_the_same_bits_however_often_it_is_struck"
_LIGHTNING_KINDS = "test_lightning::test_every_kind_of_loop_and_loader_ends_with_the_same_bits"
_LIGHTNING_RANKS = "test_lightning::test_two_processes_stop_together_and_end_with_the_same_bits"
_NO_RECORDS = "test_rehearse::test_a_script_that_resumes_right_is_called_exact"
"""Its other number of processes is not tried."""
_OWN_OTHER = "test_own_loop::test_another_number_of_processes_continues_after_as_many_samples_and_says_so"
_NOTICE = "test_own_loop::test_a_notice_loses_no_step"
_NOTICE_BUNDLED = "test_notice::test_a_noticed_attempt_saves_holds_and_is_followed_without_a_lost_step"
UNLESS_WORKERS, UNLESS_OWN_GENERATOR, UNLESS_EPOCH = "yes ¹ ³", "yes ³", "yes ²"
"""With the footnotes below the table."""
_HF_BITS = "test_hf::test_a_run_that_is_struck_ends_with_the_same_bits"
GUARANTEES: dict[str, tuple[Cell, ...]] = {
    "a torn checkpoint is never resumed": (
        shown(OWN, _COMMAND, _TRUTH),
        shown("yes", _REHEARSED),
        shown("yes", _REHEARSED),
        shown("yes", "test_hf::test_a_partial_newest_checkpoint_is_not_resumed"),
        shown("yes", _LIGHTNING, _REHEARSED),
        shown("yes", "test_faults::test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before"),
    ),
    "a notice or SIGTERM loses no step": (
        shown(OWN, "test_launch::test_a_signal_reaches_every_rank_once"),
        shown("yes", _NOTICE, "test_own_loop::test_skipped_samples_are_not_loaded", _REHEARSED),
        shown("yes", _SAMPLED, _REHEARSED),
        shown("yes", _HF_BITS),
        shown("yes", _LIGHTNING, _LIGHTNING_RANKS, _REHEARSED),
        shown("yes", "test_exact::test_sigterm_loses_no_step", _NOTICE_BUNDLED),
    ),
    "same state": (
        shown(OWN, _COMMAND, _TRUTH),
        shown("all that is registered", _OWN_BITS, "test_own_loop::test_what_no_state_dict_holds_is_named"),
        shown("all that is registered", _REHEARSED),
        shown("yes", _HF_BITS, "test_hf::test_other_ways_to_train_resume_exactly"),
        shown(UNLESS_EPOCH, _LIGHTNING, _LIGHTNING_KINDS),
        shown("yes", "test_exact::test_a_preempted_run_is_bit_identical_to_an_undisturbed_one"),
    ),
    "same samples, same number of processes": (
        shown(OWN, _COMMAND, _TRUTH),
        shown(UNLESS_WORKERS, _OWN_BITS, "test_own_loop::test_two_ranks_end_with_the_same_bits"),
        shown(UNLESS_OWN_GENERATOR, _SEEDED, _REHEARSED),
        shown(UNLESS_WORKERS, _HF_BITS, "test_hf::test_other_ways_to_train_resume_exactly"),
        shown(UNLESS_WORKERS, _LIGHTNING_KINDS, _LIGHTNING_RANKS),
        shown("yes", "test_exact::test_a_preempted_run_is_bit_identical_to_an_undisturbed_one"),
    ),
    "same samples, another number of processes": (
        shown("no", _NO_RECORDS),
        shown("no", _OWN_OTHER),
        shown(UNLESS_OWN_GENERATOR, _SAMPLED),
        shown("with `exact=True`", "test_hf::test_another_number_of_processes_has_the_same_samples_and_learning_rates"),
        shown("no", _LIGHTNING_RANKS),
        shown("yes", "test_exact::test_another_world_size_trains_on_the_same_samples_at_the_same_rate"),
    ),
    "bit-identical, same number of processes": (
        shown(OWN, _COMMAND, _TRUTH),
        shown("yes ¹ ³ ⁴", _OWN_BITS, "test_own_loop::test_two_ranks_end_with_the_same_bits", _REHEARSED),
        shown("yes ³ ⁴", _REHEARSED),
        shown("yes ¹ ³ ⁴", _HF_BITS, "test_hf::test_two_ranks_and_evaluations_at_the_end_of_epochs_resume_exactly"),
        shown("yes ¹ ² ³ ⁴", _LIGHTNING, _LIGHTNING_KINDS, _LIGHTNING_RANKS, _REHEARSED),
        shown("yes", "test_exact::test_a_preempted_run_is_bit_identical_to_an_undisturbed_one"),
    ),
}


FOOTNOTES = """\
¹ Unless loader workers draw random numbers, or the items of an `IterableDataset` do. Other exceptions: a sampler that
counts epochs itself; a registered data set with a shuffle buffer; with loader workers, a sampler that draws from the
global random numbers batch by batch, or a generator from which both the loop and the loader draw; the Trainer's
`group_by_length` and `batch_rebalance`.
² But not the means of metrics logged with `on_epoch=True`, in an epoch with a resume, nor what follows them.
³ Unless the data set draws from a generator of its own.
⁴ On more than two processes, the last bits may differ after a resume: with DDP that is compiled, or has
`static_graph=True` or `use_reentrant=True` in it; with Lightning; with the Trainer's `gradient_checkpointing`."""
_EXCEPTED = "test_sampler::test_what_the_table_of_guarantees_excepts_is_not_exact"
EXCEPTIONS: dict[str, str] = {
    "loader workers": _EXCEPTED,
    "an `IterableDataset`": _EXCEPTED,
    "counts epochs itself": _EXCEPTED,
    "a shuffle buffer": _EXCEPTED,
    "batch by batch": _EXCEPTED,
    "both the loop and the loader draw": _EXCEPTED,
    "group_by_length": "test_hf::test_batches_by_length_are_said_not_to_be_exact",
    "on_epoch=True": "test_lightning::test_a_training_ends_with_the_same_bits_however_often_it_is_struck",
    "generator of its own": _EXCEPTED,
    "static_graph=True": "",
    "use_reentrant=True": "",
    "gradient_checkpointing": "",
}
"""Words of the footnotes that the rest of the page has too, and the test that sees the exception.

Nothing sees the last three: the bits may differ, and need not.
"""


def table() -> str:
    lines = [f"| | {' | '.join(LEVELS)} |", "|---" * (1 + len(LEVELS)) + "|"]
    lines += [f"| {name} | {' | '.join(cell.text for cell in cells)} |" for name, cells in GUARANTEES.items()]
    return "\n".join(lines) + f"\n\n{FOOTNOTES}"


_ANY_LAUNCHER = "test_other_launchers::test_a_run_goes_on_under_every_launcher"
_TOLD_TO_STOP = "test_other_launchers::test_a_launcher_that_is_told_to_stop_loses_no_step_and_leaves_no_orphan"
_LOSES_CODES = "test_other_launchers::test_a_launcher_that_loses_exit_codes_is_refused_where_skypilot_looks_at_them"
_TOLD_OF = "test_other_launchers::test_a_launcher_that_loses_exit_codes_is_told_of_and_refused_under_skypilot"
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "`python -m trainer.launch --processes 8 train.py`": (
        "test_launch::test_a_signal_reaches_every_rank_once",
        "test_launch::test_a_launcher_leaves_with_the_first_of_the_stop_table",
    ),
    "`torchrun --nproc-per-node 8 train.py`": (_TOLD_TO_STOP, _LOSES_CODES, _TOLD_OF, _ANY_LAUNCHER),
    "`accelerate launch train.py`, several processes": (_TOLD_TO_STOP, _TOLD_OF),
    "`accelerate launch train.py`, one process": (
        _TOLD_TO_STOP,
        _LOSES_CODES,
        _TOLD_OF,
        "test_other_launchers::test_accelerate_launch_of_one_process_replaces_its_exit_code",
    ),
    "`srun python train.py`": ("test_cluster_launchers::test_a_run_goes_on_under_srun_whoever_ends_its_step",),
    "your own starter, which sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT": (_ANY_LAUNCHER,),
    "Open MPI's `mpirun python train.py`": (
        "test_cluster_launchers::test_mpirun_keeps_a_ranks_exit_code_but_not_after_its_own_sigterm",
        "test_cluster_launchers::test_processes_that_mpirun_starts_without_torchruns_variables_are_refused",
        _TOLD_OF,
    ),
    "MPICH's `mpirun python train.py`": (
        "test_cluster_launchers::test_mpichs_mpirun_passes_a_sigterm_on_and_has_exit_codes_of_its_own",
        _TOLD_OF,
    ),
    "`python train.py`, a notebook, pytest": (
        "test_closed_terminal::test_a_script_in_a_terminal_that_is_closed_saves_though_it_prints",
        "test_ends::test_a_block_that_ends_after_training_is_a_run_that_is_done",
        "test_hosted::test_a_cell_is_interrupted_and_fails_and_runs_again",
        "test_hosted::test_a_script_is_not_hosted_whatever_it_imports",
    ),
}
"""The first column of the launchers' table, and the tests that saw the row."""


@cache
def functions(file: str) -> frozenset[str]:
    """The tests of a file."""
    tree = ast.parse((REPO / "tests" / f"{file}.py").read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("page", ["README.md", "docs/your-own-script.md"])
def test_the_pages_have_the_table(page: str) -> None:
    assert f"\n\n{table()}\n\n" in (REPO / page).read_text(), f"{page}: put this table there:\n{table()}"


def test_the_page_explains_each_exception_of_the_footnotes_and_a_test_sees_it() -> None:
    page = " ".join((REPO / "docs" / "your-own-script.md").read_text().replace(FOOTNOTES, "").split())
    for words, test in EXCEPTIONS.items():
        assert words in " ".join(FOOTNOTES.split())
        assert words in page
        file, _, function = test.partition("::")
        assert not test or function in functions(file), test


@pytest.mark.parametrize("name", levels.LEVELS)
def test_a_rehearsal_promises_what_the_table_says(name: str) -> None:
    """The line beside a verdict; "bit-identical" includes the same samples."""
    column = 1 + list(levels.LEVELS).index(name)
    line, cell = levels.LEVELS[name], GUARANTEES["bit-identical, same number of processes"][column].text
    assert cell.startswith("yes")
    assert "bit-identical on the same number of processes" in line
    unless, _, _ = FOOTNOTES.replace("`", "").removeprefix("¹ U").partition(".")
    assert ("¹" in cell) == (f"u{unless}" in line), f"¹ U{unless}"
    assert ("²" in cell) == ("on_epoch=True" in line)
    other = GUARANTEES["same samples, another number of processes"][column].text
    says = {"no": "gets other samples", "yes ³": "; the same samples on any number"}
    assert says.get(other, "with exact=True, the same samples on any number") in line


@pytest.mark.parametrize("name", GUARANTEES)
def test_each_cell_names_tests_that_are_there(name: str) -> None:
    assert len(GUARANTEES[name]) == len(LEVELS)
    for level, cell in zip(LEVELS, GUARANTEES[name], strict=True):
        assert cell.tests, f"{name}, {level}: what shows it?"
        for test in cell.tests:
            file, _, function = test.partition("::")
            assert function in functions(file), f"{name}, {level}: there is no {test}"


def test_each_row_of_the_launchers_table_names_tests_that_are_there() -> None:
    page = (REPO / "docs" / "your-own-script.md").read_text()
    rows = page.partition("\n| started by |")[2].partition("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(LAUNCHERS)
    for row, tests in LAUNCHERS.items():
        assert tests, f"{row}: what shows it?"
        for test in tests:
            file, _, function = test.partition("::")
            assert function in functions(file), f"{row}: there is no {test}"


@pytest.mark.slow
def test_a_command_under_the_launcher_keeps_what_it_saves_itself(tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(
        "name: own\n"
        "resources: {accelerators: 'A100:1', use_spot: true, job_recovery: {recover_on_exit_codes: [75]}}\n"
        "envs: {OUT: /checkpoints/own, SKYSPOT_CHECKPOINT_DIR: /checkpoints/own, STEPS: '40'}\n"
        "file_mounts:\n"
        "  /checkpoints: {name: mine, mode: MOUNT}\n"
        f"  ~/code/counter.py: {PROGRAMS}/counter.py\n"
        f"  ~/code/trainer: {REPO}/trainer\n"
        "run: cd ~/code && exec python -m trainer.launch counter.py\n"
    )
    strikes = ("--preemptions", 2, "--kinds", "kill,sigterm", "--processes", 1)
    done = rehearse(task, *strikes, "--compare", "own/result.json", cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
