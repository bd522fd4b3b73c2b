"""Saves that take turns between files: a rehearsal resumes from each of them, and names the one that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import faultfs
import pytest
from traced import Fs

from skyspot.rehearsal import faults, remedies, turns
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.evidence import Evidence
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.machine import bucketfs_missing
from skyspot.rehearsal.result import Leg, Row, Settings
from skyspot.rehearsal.task import read_task
from skyspot.rehearsal.tracing import Tracing
from skyspot.rehearsal.verdict import Verdict

pytestmark = pytest.mark.skipif(bucketfs_missing() is not None, reason=str(faultfs.missing() or bucketfs_missing()))
EXACT = Verdict(True, True, "byte-identical")
WRONG = Verdict(False, True, "NOT exact: x differs", remedy=remedies.NO_CAUSE.remedy)
AFTER_A = "after the rename of state.tmp to a.pt"
TASK = "file_mounts: {/checkpoints: {name: b, mode: MOUNT}}\nrun: x\n"


def script(saves: int) -> Callable[[Fs], None]:
    """Saves that number: a.pt, b.pt, a.pt, ..."""

    def run(fs: Fs) -> None:
        found = [fs.read(path) for path in fs.list(r"[ab]\.pt")]
        for number in range(max(found, default=0) + 1, saves + 1):
            fs.tick()
            fs.write("state.tmp", number)
            fs.rename("state.tmp", "a.pt" if number % 2 else "b.pt")

    return run


class Rehearsal:
    """A run of some saves that was preempted once, after its second or third save, and the legs since."""

    def __init__(self, folder: Path, saves: int, after: int, verdict: Verdict, wrong: str = "", **more: str) -> None:
        self.tracing = Tracing(read_task(TASK, folder, {}, None), Settings(mount_like="local", **more))
        assert self.tracing.evidence
        self.found: Evidence = self.tracing.evidence
        self.script, self.wrong, self.legs = script(saves), wrong, [Leg("reference", "Undisturbed")]
        self.found.add("reference", Fs().attempt(self.script))
        first = Strike(after, "before", ("state.tmp",), does="open")  # So many saves are complete.
        self.main = self.leg("preempted", "Preempted", first, verdict)

    def leg(self, name: str, title: str, strike: Strike, verdict: Verdict) -> Leg:
        fs = Fs()
        for one in (strike, None):
            self.found.add(name, fs.attempt(self.script, one))
        row = Row(1, faults.AT_WRITE, "killed")
        self.legs.append(Leg(name, title, rows=[row], finished=True, verdict=verdict))
        return self.legs[-1]

    def run(self, name: str, title: str, planned: Preemption) -> Leg:
        assert planned.place
        return self.leg(name, title, planned.place.at_first, WRONG if self.wrong in title.split() else EXACT)

    def try_each(self) -> list[str]:
        """The titles of the legs that are run."""
        turns.try_each(self.tracing, self.legs, self.main, self.run)
        return [leg.title for leg in self.legs[2:]]


def test_a_file_that_no_attempt_resumed_from_gets_a_run_of_its_own(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, 8, 2, EXACT)
    assert turns.used_by(rehearsal.found, rehearsal.main, ["a.pt", "b.pt"]) == {"b.pt"}
    assert rehearsal.try_each() == ["Only a.pt"]
    assert turns.used_by(rehearsal.found, rehearsal.legs[-1], ["a.pt", "b.pt"]) == {"a.pt"}
    assert rehearsal.main.verdict == EXACT


def test_where_that_run_is_wrong_the_file_is_the_cause(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, 8, 2, EXACT, wrong="a.pt")
    rehearsal.try_each()
    found = rehearsal.legs[-1].verdict
    assert found
    assert found.remedy == remedies.ONE_SLOT.remedy
    cause = "saves take turns between a.pt and b.pt, and the result is right after a resume from b.pt alone"
    assert found.text == f"NOT exact: x differs. Likely cause: a.pt: {cause}"
    assert rehearsal.main.verdict == EXACT


@pytest.mark.parametrize(("wrong", "named"), [("b.pt", True), ("a.pt", False)])
def test_of_a_result_that_is_wrong_each_file_is_tried_alone(tmp_path: Path, wrong: str, named: bool) -> None:
    rehearsal = Rehearsal(tmp_path, 8, 2, WRONG, wrong=wrong)
    assert rehearsal.try_each() == ["Only a.pt", "Only b.pt"]
    assert rehearsal.main.verdict
    # It went on from b.pt: if that is right by itself, something else is wrong.
    assert ("Likely cause: b.pt: saves take turns" in rehearsal.main.verdict.text) == named


def test_a_file_that_nothing_can_resume_from_is_no_proof(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, 8, 3, EXACT)
    over = Leg("slot-2", "Only b.pt", verdict=EXACT)  # It came to its end before its strike.
    turns.try_each(rehearsal.tracing, rehearsal.legs, rehearsal.main, lambda name, title, one: over)
    why = "saves take turns between a.pt and b.pt, and no attempt resumed from b.pt; train longer"
    assert rehearsal.main.verdict == Verdict(False, False, f"not checked: {why}")


def test_the_place_of_such_a_run_can_be_named(tmp_path: Path) -> None:
    settings = Settings(kinds=(faults.AT_WRITE,), preemptions=1, at=AFTER_A, mount_like="local")
    rehearsal = Rehearsal(tmp_path, 8, 2, EXACT, at=AFTER_A, kinds=(faults.AT_WRITE,))  # type: ignore[arg-type]
    [planned] = rehearsal.tracing.at_calls([Preemption(faults.AT_WRITE)], settings)
    assert planned.place == rehearsal.found.after_a_save("a.pt")
    assert rehearsal.try_each() == [], "nothing else is struck"
