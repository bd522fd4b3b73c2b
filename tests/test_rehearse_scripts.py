"""Each of the scripts in tests/programs/scripts is rehearsed as its user would, and the verdict is the truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faultfs
import pytest
from programs.scripts import truth
from programs.scripts.truth import (
    AT_WRITE,
    EXACT,
    IN_SAVE,
    KINDS,
    NOT_CHECKED,
    NOT_EXACT,
    STAYS_DOWN,
    TORN,
    TRUTHS,
    Truth,
)
from support_rehearse import leftovers, rehearse

from skyspot.rehearsal.by_kind import NOT_TRIED, UNKNOWN
from skyspot.rehearsal.machine import bucketfs_missing

TASK = """\
name: own
resources: {{use_spot: true}}
envs: {{OUT: /checkpoints/own, OMP_NUM_THREADS: "1"}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT}}
  ~/code/{path.name}: {path}
run: |
  python ~/code/{path.name}
"""
SAID = {
    truth.DATA_ORDER: "the data order",
    truth.OPTIMIZER: "was not read",
    truth.LEARNING_RATE: "the LR",
    truth.MORE_STEPS: "trains more steps than asked",
    truth.FEWER_STEPS: "trains fewer steps than asked",
    truth.OLDER: "it went on from",
    truth.BEST_LOST: "unlike in the undisturbed run",
    truth.NOT_USED: "it read own/last.pkl",
    truth.NO_CHECKPOINT: "saves nothing before its end",
    truth.MIXED: "a mixed pair of files of two saves",
    truth.HALF: "in the middle of the write",
    truth.AT_NOTICE: "saved at SIGTERM",
    truth.RNG_IGNORED: "was half written, and was read all the same",
    truth.WORKERS: "loader workers died of SIGTERM",
    truth.NOT_REPRODUCIBLE: "not reproducible by itself",
    truth.ENDLESS: "does not end",
    truth.ONE_SLOT: "saves take turns between own/a.pkl and own/b.pkl",
    truth.DELETED: "was complete, but had been deleted",
    truth.UNNAMED: "own/result.json differs in key",
}
"""What a rehearsal says of each cause."""
QUICK = ("falls_back",)
"""These are right or wrong within 10 s; all others are slow."""


@dataclass(frozen=True)
class Kind:
    """One row of the table by kind."""

    outcome: str
    why: str


def test_every_cause_has_its_words() -> None:
    assert {one.cause for one in TRUTHS} - {""} == set(SAID)


@pytest.mark.skipif(bucketfs_missing() is not None, reason=str(faultfs.missing() or bucketfs_missing()))
@pytest.mark.parametrize(
    "one", [pytest.param(one, id=one.script, marks=[] if one.script in QUICK else pytest.mark.slow) for one in TRUTHS]
)
def test_a_rehearsal_tells_the_truth_of_a_script(one: Truth, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(TASK.format(path=one.path))
    done = rehearse(
        "task.yaml", "--compare", f"own/{one.result}", "--mount-like", "local", "--processes", 1, "--json",
        *one.options, *one.show, cwd=tmp_path,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    result = json.loads(done.stdout)
    assert done.returncode == (0 if one.verdict == EXACT else 1), done.stdout
    told = texts(result)
    if one.cause:
        assert SAID[one.cause] in " ".join(told), told
    if one.files:
        assert any(f"own/{named(file)}" in text for file in one.files for text in told), told
    check_kinds(one, {row["kind"]: Kind(row["outcome"], row["why"]) for row in result["kinds"]}, fell_in_a_save(result))
    assert not [path for path in leftovers(tmp_path) if "rehearsal-log" not in path]


@pytest.mark.skipif(bucketfs_missing() is not None, reason=str(faultfs.missing() or bucketfs_missing()))
@pytest.mark.slow(50)  # Many attempts.
def test_every_place_in_a_save_has_the_verdict_that_it_has_alone(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(TASK.format(path=truth.HERE / "four_files.py"))
    done = rehearse(
        "task.yaml", "--compare", "own/result.json", "--mount-like", "local", "--processes", 1, "--json",
        "--kinds", "kill-at-write", "--every-write", cwd=tmp_path,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    rows = {row["place"]: row["outcome"] for row in json.loads(done.stdout)["kinds"]}
    last = "own/state/trainer_state.json"
    for place, outcome in rows.items():
        if "the write to" in place:  # The file is cut, be it to nothing.
            assert outcome == STAYS_DOWN, place
        elif place in ("before the emptying of own/state/weights.npy", f"before the close of {last}"):
            assert outcome == EXACT, place
        elif not place.startswith("after"):  # Files of two saves.
            assert outcome == NOT_EXACT, place
    assert rows[f"after the close of {last}"] == EXACT
    assert len(rows) > 16, "four files, each emptied, written and closed"


def fell_in_a_save(result: dict[str, Any]) -> set[str]:
    """The kinds of strikes at a time of which one left a save incomplete, as a kill in a save does."""
    rows = [row for leg in result["legs"] for row in leg["rows"]]
    return {row["kind"] for row in rows if "part of" in (row["there"] or "")} - {IN_SAVE, AT_WRITE, TORN}


def check_kinds(one: Truth, kinds: dict[str, Kind], in_a_save: set[str]) -> None:
    """No kind is called wrong that is right, and the fault is shown by one that has it.

    A strike that can show the fault may miss it: one between two files of the last save has nothing after it.
    """
    assert set(kinds) <= set(KINDS)
    for kind, row in kinds.items():
        if row.outcome in (UNKNOWN, NOT_TRIED):
            continue
        assert one.verdict != NOT_CHECKED, (kind, row)
        another = row.outcome == NOT_EXACT and row.why.endswith("or another kind of the same run")
        as_in_a_save = one.fails.get(IN_SAVE) if kind in in_a_save else EXACT
        assert row.outcome in (EXACT, one.fails.get(kind, EXACT), as_in_a_save) or another, (kind, row)
    if one.fails:
        assert any(kinds[kind].outcome == one.fails[kind] for kind in kinds.keys() & one.fails.keys()), kinds
    elif one.verdict == EXACT:
        assert any(row.outcome == EXACT for row in kinds.values()), kinds


def texts(result: dict[str, Any]) -> list[str]:
    """Every verdict, and how each attempt ended."""
    verdicts = [leg["verdict"]["text"] for leg in result["legs"] if leg["verdict"]]
    return [*verdicts, *(row["ended"] for leg in result["legs"] for row in leg["rows"])]


def named(file: str) -> str:
    """The part of a file's path before its number."""
    return file.partition("#")[0]
