"""Rehearsals of a task with records: exit status 0 only if it was struck after a save and resumed from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import faultfs
import pytest
from support import PROGRAMS
from support_rehearse import rehearse

from skyspot.errors import UsageError
from skyspot.rehearsal import by_kind, evidence, faults, records, remedies
from skyspot.rehearsal.legs import Legs
from skyspot.rehearsal.machine import bucketfs_missing
from skyspot.rehearsal.result import Leg, Row, Settings, refuse_calls
from skyspot.rehearsal.task import read_task
from skyspot.rehearsal.tracing import Tracing
from skyspot.rehearsal.verdict import History, Verdict
from skyspot.rehearsal.watch import Watch
from trainer.bucket.hashing import hash_file
from trainer.layout.documents import to_json
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import MANIFEST, AttemptName, CheckpointName, RunPaths

TASK = f"""\
name: own
envs: {{OUT: /checkpoints/own, MODE: right}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT}}
  ~/recorded.py: {PROGRAMS / "recorded.py"}
run: python ~/recorded.py
"""


def rehearsed(folder: Path, mode: str, *args: object) -> tuple[int, dict]:
    (folder / "task.yaml").write_text(TASK)
    done = rehearse("task.yaml", "--env", f"MODE={mode}", "--processes", 1, "--json", *args, cwd=folder)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def outcomes(result: dict) -> dict[str, str]:
    return {one["kind"]: one["outcome"] for one in result["kinds"]}


@pytest.mark.slow  # A rehearsal; quick tests below show the same.
def test_a_kill_that_is_the_only_strike_comes_after_a_save_and_is_proof(tmp_path: Path) -> None:
    code, result = rehearsed(tmp_path, "right", "--kinds", "kill", "--preemptions", 1)
    assert code == 0, result
    killed, resumed = result["legs"][1]["rows"]
    assert killed["left_step"] >= 5
    assert resumed["restored_step"] == killed["left_step"]
    assert outcomes(result) == {"kill": "exact"}


@pytest.mark.slow  # A rehearsal; quick tests below show the same.
def test_a_task_that_deletes_its_checkpoints_has_lost_work_though_its_history_is_the_same(tmp_path: Path) -> None:
    code, result = rehearsed(tmp_path, "deletes", "--kinds", "kill,sigterm", "--preemptions", 2)
    assert code == 1
    found = result["legs"][1]["verdict"]
    assert found["text"].startswith("LOST WORK: attempt 2 began from nothing though the checkpoint of step ")
    assert found["remedy"] == remedies.RUN_FOLDER.remedy
    assert result["legs"][1]["rows"][1]["resumed"] == "nothing: LOST WORK"
    assert outcomes(result) == {"kill": "LOST WORK", "sigterm": "LOST WORK"}


@pytest.mark.slow  # A rehearsal; a quick test below shows the same.
def test_a_task_whose_attempts_make_folders_of_their_own_is_told_to_use_one(tmp_path: Path) -> None:
    code, result = rehearsed(tmp_path, "folders", "--kinds", "kill", "--preemptions", 1)
    assert code == 1
    text = result["legs"][1]["verdict"]["text"]
    assert re.match(
        r"LOST WORK: each attempt made a run folder of its own \(own-\w{4}, own-\w{4}\): use one name", text
    )
    assert result["legs"][1]["rows"][1]["resumed"] == "nothing: LOST WORK"
    assert outcomes(result) == {"kill": "LOST WORK"}


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (("--kinds", "kill,kill-at-write"), "--kinds kill-at-write: this task records its steps"),
        (("--every-write",), "remove --every-write, and strike its saves with --kinds kill-in-save"),
    ],
)
def test_strikes_at_calls_are_refused_where_steps_are_recorded(options: tuple[str, ...], remedy: str) -> None:
    kinds = tuple(options[1].split(",")) if "--kinds" in options else faults.DEFAULT_KINDS
    with pytest.raises(UsageError) as refused:
        refuse_calls(Settings(kinds=kinds, every_write="--every-write" in options))
    assert remedy in str(refused.value)
    refuse_calls(Settings())


@pytest.mark.skipif(bucketfs_missing() is not None, reason=str(faultfs.missing() or bucketfs_missing()))
@pytest.mark.parametrize(
    ("mount", "like", "manners"),
    [
        ("name: b", None, {}),
        ("name: b", "gcs", {"/checkpoints": "gcs"}),
        ("name: b, store: gcs", None, {"/checkpoints": "gcs"}),
    ],
)
def test_a_mount_that_is_told_has_its_manners_on_every_machine(
    tmp_path: Path, mount: str, like: str | None, manners: dict[str, str]
) -> None:
    task = read_task(f"file_mounts: {{/checkpoints: {{{mount}, mode: MOUNT}}}}\nrun: x\n", tmp_path, {}, None)
    tracing = Tracing(task, Settings(mount_like=like))
    assert tracing.manners, "the undisturbed run has them always"
    assert tracing.manners_with_records == manners
    note = tracing.note_with_records()
    assert note is None if manners else "--mount-like s3" in str(note)


# -- the judgment, from the records alone


def attempt_of(root: Path, number: int, restored: int | None) -> AttemptName:
    paths, name = RunPaths(root), AttemptName(number, f"{number:06x}")
    paths.attempt(name).mkdir(parents=True)
    if restored is not None:
        paths.event(name, 1, "restored").write_bytes(to_json({"step": restored}))
    return name


def checkpoint(root: Path, step: int, attempt: AttemptName, **facts: object) -> Path:
    folder = RunPaths(root).checkpoint(CheckpointName(step, attempt, step))
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(b"12345678")
    files = {"state.json": FileRecord(8, hash_file(folder / "state.json"))}
    (folder / MANIFEST).write_bytes(Manifest("checkpoint", files, {"step": step, **facts}).to_json())
    return folder


def filled(root: Path, number: int, restored: int | None, before: Row | None, *saves: int, kind: str = "kill") -> Row:
    """The row of an attempt that resumes from a step and saves at others."""
    watch, row = Watch(root.parent, root.name), Row(number, kind, kind)
    name = attempt_of(root, number, restored)
    for step in saves:
        checkpoint(root, step, name)
    records.fill(row, watch)
    records.judge_start(row, watch, before)
    return row


@pytest.mark.parametrize(
    ("saves", "restored", "resumed", "unproven"),
    [
        ((20, 40), 40, None, ""),
        ((20, 40), 20, "step 20: LOST WORK", ""),
        ((20,), 0, "nothing: LOST WORK", ""),
        ((), 0, None, "no checkpoint was complete"),
        ((20,), None, None, "nothing was left to do"),
    ],
)
def test_the_next_attempt_tells_whether_it_resumed(
    tmp_path: Path, saves: tuple[int, ...], restored: int | None, resumed: str | None, unproven: str
) -> None:
    first = filled(tmp_path / "own", 1, 0, None, *saves)
    second = filled(tmp_path / "own", 2, restored, first, kind="finished")
    assert first.left_step == max(saves, default=0)
    assert (second.resumed, second.lost_work, second.unproven) == (resumed, resumed is not None, unproven)


def test_a_command_under_the_launcher_keeps_what_the_calls_tell_of_it(tmp_path: Path) -> None:
    """It has attempts, but no records of steps."""
    watch, row = Watch(tmp_path, "own"), Row(2, "kill", "killed", resumed="nothing: LOST WORK", lost_work=True)
    attempt_of(tmp_path / "own", 2, None)
    records.fill(row, watch)
    assert (row.resumed, row.lost_work, row.unproven, row.left_step) == ("nothing: LOST WORK", True, "", None)


def test_a_checkpoint_that_is_torn_or_not_finite_need_not_be_resumed_from(tmp_path: Path) -> None:
    name, row = attempt_of(tmp_path / "own", 1, 0), Row(1, "kill", "killed")
    checkpoint(tmp_path / "own", 10, name)
    checkpoint(tmp_path / "own", 20, name, finite=False)
    records.judge_start(row, Watch(tmp_path, "own"), None)
    assert row.left_step == 10, "the newest is not finite"
    checkpoint(tmp_path / "own", 30, name)
    assert str(faults.tear(tmp_path, "own")).endswith("30/state.json")
    (checkpoint(tmp_path / "own", 40, name) / MANIFEST).unlink()
    records.judge_start(row, Watch(tmp_path, "own"), None)
    assert row.left_step == 10


@pytest.mark.parametrize("second", ["own-b", "own-z"])
def test_a_run_folder_of_its_own_is_lost_work(tmp_path: Path, second: str) -> None:
    first = filled(tmp_path / "own-m", 1, 0, None, 20)
    watch, row = Watch(tmp_path, None), Row(2, "finished", "finished")
    checkpoint(tmp_path / second, 40, attempt_of(tmp_path / second, 2, 0))
    records.fill(row, watch)
    records.judge_start(row, watch, first)
    assert (row.restored_step, row.lost_work, row.resumed) == (0, True, "nothing: LOST WORK")
    folders = records.run_folders(tmp_path, None)
    assert sorted(folders) == sorted(["own-m", second])
    found = records.judge([first, row], same=False, folders=folders)
    assert found
    assert found.text == f"LOST WORK: each attempt made a run folder of its own ({', '.join(folders)}): use one name"
    assert records.run_folders(tmp_path, tmp_path) == [], "they lay there before"


def test_the_records_tell_the_first_save_the_lost_steps_and_the_goodput(tmp_path: Path) -> None:
    paths, name = RunPaths(tmp_path / "own"), attempt_of(tmp_path / "own", 1, 0)
    for number, (event, facts) in enumerate(
        [("first-step", {"step": 1, "seconds": 0.5}), ("saved", {"step": 20}), ("saved", {"step": 40})], start=2
    ):
        paths.event(name, number, event).write_bytes(to_json(facts))
    assert (records.first_save(paths), records.first_save(None)) == (20, None)
    killed, at_a_save = (Row(1, "kill", "killed", last_step=step) for step in (47, 40))
    records.set_lost_steps(killed, 40)
    records.set_lost_steps(at_a_save, 41)
    assert (killed.lost_steps, at_a_save.lost_steps) == (7, 0)
    history = History({1: {"step_s": 0.5}, 2: {"step_s": 0.25}, 3: {}}, {}, {})
    assert records.goodput(history, 3.0) == 0.25
    assert records.goodput(None, 3.0) is None


def test_lost_work_fails_and_no_resume_at_all_is_not_checked() -> None:
    first, lost = Row(1, "kill", "killed", left_step=20), Row(2, "sigterm", "SIGTERM", restored_step=0, lost_work=True)
    last = Row(3, "finished", "finished", restored_step=40)
    found = records.judge([first, lost, last], same=True)
    assert found
    assert (found.exact, found.checked, found.cause) == (False, True, evidence.LOST)
    assert by_kind.in_a_word(found) == "LOST WORK"
    leg = Leg("preempted", "Preempted", 2, rows=[first, lost, last], finished=True, verdict=found)
    assert [by_kind.outcome(leg, order) for order in (0, 1)] == ["LOST WORK", "exact"]
    other = records.judge([first, lost, last], same=False)
    assert other
    assert other.cause is None, "the other strikes are not exact then"
    from_nothing = Row(2, "finished", "finished", restored_step=0, unproven="no checkpoint was complete")
    found = records.judge([first, from_nothing], same=True)
    assert found
    assert (found.checked, found.text.partition(";")[0]) == (
        False, "not checked: every strike came before its first checkpoint was complete"
    )  # fmt: skip
    assert records.judge([first, last], same=True) is None
    assert records.judge([first, from_nothing], same=False) is None, "the difference says more"
    leg.rows, leg.verdict = [first, from_nothing], Verdict(True, True, "bit-identical")
    assert by_kind.outcome(leg, 0) == "not tried"


def test_a_schedule_has_a_kill_that_proves_something() -> None:
    for seed in range(20):
        for kinds, count in ((["kill"], 1), (["kill"], 3), (list(faults.DEFAULT_KINDS), 5)):
            plan = faults.schedule(kinds, count, seed, steps=60, first_save=20)
            kills = [one for one in plan if one.kind == "kill"]
            assert kills[-1].saved
            assert kills[-1].after_resume or 20 < (kills[-1].at_step or 0) < 60
            assert (kills[0].at_step or 0) < 20 or len(kills) == 1
        [late] = faults.schedule(["kill"], 1, seed, steps=60, first_save=60)
        assert not late.saved, "it saves at its end only, so it would never be struck"
        assert 1 <= (late.at_step or 0) < 60


@pytest.mark.parametrize("records", [True, False])
def test_after_a_save_that_was_cut_off_a_task_with_records_is_struck_again(records: bool) -> None:
    """The records tell what the next attempt resumed from; without them it runs to its end, and the result tells."""
    leg, strike = Leg("preempted", "Preempted", planned=2), faults.Preemption("sigterm", at_step=5)
    leg.rows.append(Row(1, "kill-in-save", "killed while saving after step 3", 1))
    cut_off = SimpleNamespace(records=records, tracing=SimpleNamespace(runs_to_its_end=lambda *_: True))
    assert Legs._next(cut_off, leg, [strike], True) == (strike if records else None)  # type: ignore[arg-type]
