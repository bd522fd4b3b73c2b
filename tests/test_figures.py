"""The figures of README and docs: those of the pages that the benches and the campaign write, and of the code."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import Any

import pytest
from support import REPO

README = "README.md"
ATTEMPT, CHECKPOINTS, COST, DESIGN, NOTICES, REHEARSE, REPORT, SCRIPTS = (
    f"docs/{name}.md"
    for name in ("attempt", "checkpoints", "cost", "design", "notices", "rehearse", "report", "your-own-script")
)
LIMITS: list[tuple[str, str, str, float]] = [
    (README, "three attempts in a row ended by themselves", "trainer/attempt/history.py OWN_DOING_IN_A_ROW", 3),
    (README, "or ten however they ended", "trainer/attempt/history.py ANY_END_IN_A_ROW", 10),
    (README, "`stop` (after three in a row)", "trainer/training/finite.py IN_A_ROW[STOP]", 3),
    (README, "stopped after 30 minutes", "skyspot/rehearsal/limits.py LEAST_S", 1800),
    (README, "(10 times the undisturbed run, if that is longer)", "skyspot/rehearsal/limits.py TIMES", 10),
    (ATTEMPT, "killed 3 s after its grace", "trainer/launch/supervisor.py KILL_AFTER_GRACE_S", 3),
    (ATTEMPT, "killed 5 s after it was asked to", "trainer/attempt/ending.py END_EVENT_S", 5),
    (ATTEMPT, "by itself; killed after 5 s", "trainer/attempt/ending.py END_EVENT_S", 5),
    (ATTEMPT, "the launcher waits 1 s for it", "trainer/launch/supervisor.py RELAY_S", 1),
    (ATTEMPT, "abandoned 5 s after a stop's commit", "trainer/trackers/tracking.py STOPPED_S", 5),
    (ATTEMPT, "60 s after the last step", "trainer/trackers/tracking.py FINISHED_S", 60),
    (ATTEMPT, "ends the process after 5 s", "trainer/training/unwinding.py CLOSERS_S", 5),
    (ATTEMPT, "a trial of namespaces | the first machine | a temporary folder | by itself; killed after 60 s",
     "skyspot/rehearsal/machine.py PROBE_S", 60),
    (ATTEMPT, "through FUSE | the first machine | a temporary folder | by itself; killed after 60 s",
     "skyspot/rehearsal/machine.py PROBE_S", 60),
    (ATTEMPT, "killed after 600 s", "skyspot/rehearsal/compare/command.py LIMIT_S", 600),
    (COST, "2 h, as the trainer assumes before it has seen any", "skyspot/money/expected.py BETWEEN_S", 7200),
    (COST, "2 h, as the trainer assumes", "trainer/checkpoint/interval.py PRIOR_S", 7200),
    (COST, "10 min: a new machine, its set-up, the restore", "skyspot/money/expected.py RECOVERY_S", 600),
    (COST, "5 s of training", "skyspot/money/expected.py SAVE_COST_S", 5),
    (COST, "shown 3 of 41 places", "skyspot/cli/cost_tables.py SHOWN", 3),
    (DESIGN, "in blocks of 64 KB", "trainer/finetune/text.py BLOCK_BYTES", 64 << 10),
    (DESIGN, "windows** of 64 K characters", "trainer/finetune/encoding.py WINDOW", 64 << 10),
    (DESIGN, "that overlap by 4 K", "trainer/finetune/encoding.py OVERLAP", 4 << 10),
    (DESIGN, "where eight tokens on both sides agree", "trainer/finetune/encoding.py AGREE", 8),
    (DESIGN, "A `.jsonl` line over 4 MB", "trainer/finetune/text.py LONG_LINE", 4 << 20),
    (DESIGN, "the trainer retries for ten minutes, honours a stop meanwhile, and then ends with 75",
     "trainer/finetune/hub.py RETRY_S", 600),
    (DESIGN, "it waits a minute for an older attempt", "trainer/ranks/rendezvous.py BIND_PATIENCE_S", 60),
    (DESIGN, "hold for two minutes", "trainer/training/participant.py REQUESTED_STOP_S", 120),
    (DESIGN, "every tenth save prints what is kept", "trainer/checkpoint/pruning.py PRINT_EVERY", 10),
    (DESIGN, "have changed nothing for ten minutes", "trainer/checkpoint/pruning.py DEAD_S", 600),
    (DESIGN, "with one in two hours as a prior", "trainer/checkpoint/interval.py PRIOR_S", 7200),
    (DESIGN, "at least twice as long as a save takes", "trainer/checkpoint/interval.py IDLE_SHARE", 2),
    (DESIGN, "120 s a call", "trainer/bucket/deadlines.py LIMIT_S", 120),
    (DESIGN, "the file's bytes at 10 MB/s", "trainer/bucket/deadlines.py SLOWEST_BYTES_PER_S", 10e6),
    (DESIGN, "it is read six times within a quarter of a minute", "trainer/checkpoint/restore.py READ_TRIES", 6),
    (DESIGN, "Before `start` the trainer retries for ten minutes", "trainer/bucket/retry.py START_RETRY_S", 600),
    (DESIGN, "20000 to 29999", "trainer/launch/nodes.py FIRST_PORT", 20000),
    (DESIGN, "20000 to 29999", "trainer/launch/nodes.py PORTS", 10000),
    (DESIGN, "its processes get SIGTERM and 30 s", "skyspot/rehearsal/machine.py LEAVE_S", 30),
    (DESIGN, "may take 30 minutes", "skyspot/rehearsal/limits.py LEAST_S", 1800),
    (DESIGN, "4 times the undisturbed run", "skyspot/rehearsal/engine.py PATIENCE", 4),
    (DESIGN, "the undisturbed run, or 30 s", "skyspot/rehearsal/engine.py PATIENCE_S", 30),
    (DESIGN, "closed within half a second", "skyspot/rehearsal/bucketfs/store.py _BURST_S", 0.5),
    (DESIGN, "A write of 32 KiB or more", "skyspot/rehearsal/bucketfs/files.py _LARGE", 32 << 10),
    (REHEARSE, "at most 1.1 times as long in a bucket that is served through FUSE", "bench/bucketfs.py BOUND", 1.1),
    (REHEARSE, "had taken 5 s or more", "skyspot/rehearsal/resumes.py _TELLING_S", 5),
    (REHEARSE, "SIGTERM; 45 s later SIGKILL", "skyspot/rehearsal/faults.py TERM_PATIENCE_S", 45),
    (REPORT, "With more than 20 attempts, one bar", "skyspot/cli/report_tables.py MAX_BARS", 20),
    (REPORT, "With more than 25 attempts, the whole run", "skyspot/page/words.py MOST_BARS", 25),
    (REPORT, "the whole run in 12 rows", "skyspot/page/words.py ROWS", 12),
    (REPORT, "shorter than 1/1500 of the run", "skyspot/page/page.py MOST_PIECES", 1500),
    (REPORT, "More than 400 steps are thinned", "skyspot/page/curves.py MOST_POINTS", 400),
    (NOTICES, "`--hang-timeout` seconds (600; 0: no limit)", "trainer/training/config.py HANG_TIMEOUT_S", 600),
    (NOTICES, "asked once, side by side, for 2 s at most", "trainer/notices/here.py PROBE_S", 2),
    (SCRIPTS, "`atexit` functions have five seconds", "trainer/training/unwinding.py CLOSERS_S", 5),
    (CHECKPOINTS, "not found within 2,000", "tests/chaos/campaign.py PLANT_FAULTS", 2000),
    (CHECKPOINTS, "last of twelve faults", "tests/chaos/campaign.py EPISODE", 12),
    (CHECKPOINTS, "kills its processes 3 s after the notice", "trainer/launch/supervisor.py KILL_AFTER_GRACE_S", 3),
    (CHECKPOINTS, "leaves 4 s later", "trainer/launch/supervisor.py LEAVE_AFTER_KILL_S", 4),
    (CHECKPOINTS, "20 s are for a machine with other work", "tests/chaos/stop_scene.py MARGIN_S", 20),
    (CHECKPOINTS, "checked every 10 ms", "tests/chaos/watch.py LOOK_S", 0.01),
    ("CHANGELOG.md", "8 MB at a time", "trainer/bucket/hashing.py CHUNK_BYTES", 8 << 20),
    ("CHANGELOG.md", "says so within 20 s, or within a minute", "skyspot/runs/workers.py TIMEOUT_S", 20),
    ("CHANGELOG.md", "within a minute if SkyPilot's list", "skyspot/jobs/training.py LISTING_S", 60),
    ("CHANGELOG.md", "the trainer retries for ten minutes, then exits with 75", "trainer/finetune/hub.py RETRY_S", 600),
    ("CHANGELOG.md", "after three such steps in a row", "trainer/training/finite.py IN_A_ROW[STOP]", 3),
    ("CHANGELOG.md", "have 30 s from a SIGTERM on", "skyspot/rehearsal/machine.py LEAVE_S", 30),
    ("CHANGELOG.md", "by default after 30 minutes", "skyspot/rehearsal/limits.py LEAST_S", 1800),
    ("CHANGELOG.md", "10 times as long as the undisturbed run took", "skyspot/rehearsal/limits.py TIMES", 10),
]  # fmt: skip
"""(page, what it says, the file and the constant, the constant's value)."""


@cache
def text(page: str) -> str:
    """A page with one blank between two words."""
    return " ".join((REPO / page).read_text().split())


@cache
def constants(file: str) -> dict[str, Any]:
    """The constants of a module that are made of literals alone, without an import of it."""
    found: dict[str, Any] = {}
    for node in ast.parse((REPO / file).read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            try:
                value = eval(ast.unparse(node.value), {"__builtins__": {}}, dict(found))
            except Exception:
                continue
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value if isinstance(target, ast.Tuple) else [value]
            found.update(zip(map(ast.unparse, names), values, strict=True))
    return found


def value(place: str) -> Any:
    file, name = place.split(" ")
    return eval(name, {"__builtins__": {}}, constants(file))


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the table whose first line begins with the header."""
    table = (REPO / page).read_text().partition(f"\n| {header} ")[2].partition("\n\n")[0]
    assert table, f"{page}: no table {header}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize(("page", "says", "place", "is_"), LIMITS, ids=lambda one: str(one)[:40])
def test_a_limit_that_a_page_names_is_the_codes(page: str, says: str, place: str, is_: float) -> None:
    assert says in text(page)
    assert value(place) == is_, f"{page} says: {says}"


def test_the_faults_that_readme_counts_are_those_of_the_campaigns_results() -> None:
    [(struck, hit, lost)] = re.findall(
        r"\*\*([\d,]+) faults in .*?, ([\d,]+) of them hit, (\d+) not survived\*\*", text("docs/chaos-results.md")
    )
    assert lost == "0"
    stores = rows("docs/chaos-results.md", "store")
    sums = [sum(int(row[column].replace(",", "")) for row in stores) for column in (1, 2, 3)]
    assert [f"{one:,}" for one in sums] == [struck, hit, "0"]
    assert f"{struck} faults, nothing lost: `make chaos`" in text(README)
    assert f"All {struck} faults were survived" in text(CHECKPOINTS)
    assert {*re.findall(r"[\d,]{5,} faults", text(README) + text(CHECKPOINTS) + text("Makefile"))} == {
        f"{struck} faults"
    }


def test_what_readme_says_of_a_rehearsal_beside_ckpt_chaos_is_what_was_measured() -> None:
    found = rows("docs/performance.md", "Script")
    assert (
        "On five scripts, it found all places at which the independent ckpt-chaos sees a failure, in less time"
        in text(README)
    )
    assert len(found) == 5
    for script, _, _, _, missed, *_, ratio, _ in found:
        assert missed == "0", script
        assert float(ratio.removesuffix("x")) < 1, script


def test_what_readme_says_of_ckpt_chaos_on_frameworks_is_what_was_measured() -> None:
    below = (REPO / "docs/performance.md").read_text().partition("\n## ckpt-chaos on Hugging Face's Trainer")[2]
    lines = re.findall(
        r"^\| `\w+\.py` +\| [12] +\| (without|with skyspot) .*\| (\d+) of (\d+) +\| \d+ s +\|$", below, re.M
    )
    assert len(lines) == 8, "two scripts, on one process and on two, without skyspot and with it"
    sums = {
        way: " of ".join(str(sum(int(line[column]) for line in lines if line[0] == way)) for column in (1, 2))
        for way in ("without", "with skyspot")
    }
    assert (
        f"bit-identically: {sums['with skyspot']} runs | the same scripts without skyspot: {sums['without']} ("
        in text(README)
    )


def test_every_bound_of_the_bench_holds() -> None:
    assert [row for row in rows("docs/performance.md", "What") if row[-1] != "yes"] == []


def test_the_first_line_of_the_figures_names_the_commands_that_write_them() -> None:
    line = "`make bench` writes this file, and `make peers` its last two sections: the results of one run of each"
    assert line in text("docs/performance.md")
    assert line in text("bench/report.py")
    peers = (REPO / "Makefile").read_text().partition("\npeers:")[2].partition("\n\n")[0]
    by = re.findall(r"^Measured by `python -m (bench\.\w+)", (REPO / "docs/performance.md").read_text(), re.M)
    assert by[-2:] == [one for one in by if re.search(rf"-m {re.escape(one)}$", peers, re.M)]


def test_readme_counts_the_kinds_of_damage_and_the_processes_that_the_tests_try() -> None:
    damage = constants_of_names("tests/test_faults.py", "DAMAGE")
    assert len(damage) == 9
    assert "nine kinds of damage: `tests/test_faults.py`" in text(README)
    assert '@pytest.mark.parametrize("processes", [1, 2, 3, 4]) def test_a_preempted_run_is_bit_identical' in text(
        "tests/test_exact.py"
    )
    assert "a preemption with 1 to 4 processes" in text(README)


def constants_of_names(file: str, name: str) -> list[str]:
    """The names in a list of a module."""
    [node] = [one for one in ast.parse((REPO / file).read_text()).body
              if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == name]  # fmt: skip
    assert isinstance(node.value, ast.List)
    return list(map(ast.unparse, node.value.elts))


def test_the_table_of_planted_mistakes_is_the_campaigns() -> None:
    [plants] = [one.value for one in ast.parse((REPO / "tests/chaos/plants.py").read_text()).body
                if isinstance(one, ast.AnnAssign) and ast.unparse(one.target) == "PLANTS"]  # fmt: skip
    assert isinstance(plants, ast.Dict)
    stores = [ast.literal_eval(one.elts[0]) for one in plants.values if isinstance(one, ast.Tuple)]
    names = [ast.literal_eval(key) for key in plants.keys if key]
    assert [tuple(row[:2]) for row in rows(CHECKPOINTS, "name")] == list(zip(names, stores, strict=True))


def test_the_table_of_planted_mistakes_about_stops_is_the_campaigns() -> None:
    [plants] = [one.value for one in ast.parse((REPO / "tests/chaos/stop_plants.py").read_text()).body
                if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "PLANTS"]  # fmt: skip
    assert isinstance(plants, ast.Dict)
    assert [row[0] for row in rows(CHECKPOINTS, "planted")] == [ast.literal_eval(key) for key in plants.keys if key]


def test_what_the_code_no_longer_says_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(constants("trainer/bucket/deadlines.py"), "LIMIT_S", 60.0)
    with pytest.raises(AssertionError, match="120 s a call"):
        test_a_limit_that_a_page_names_is_the_codes(DESIGN, "120 s a call", "trainer/bucket/deadlines.py LIMIT_S", 120)
