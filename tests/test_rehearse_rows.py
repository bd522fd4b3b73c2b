"""What a rehearsal tells of each attempt, and the causes and remedies beside its verdicts."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faultfs
import pytest
from rich.console import Console
from support_rehearse import rehearse, trains
from traced import Fs

from skyspot.rehearsal import advice, attempts, by_kind, machine, remedies, times
from skyspot.rehearsal.bucketfs import manners
from skyspot.rehearsal.bucketfs.manners import MANNERS, REMEDIES
from skyspot.rehearsal.bucketfs.trace import Call
from skyspot.rehearsal.evidence import Evidence
from skyspot.rehearsal.junit import junit
from skyspot.rehearsal.refusals import Refusal, refusals
from skyspot.rehearsal.remedies import Cause
from skyspot.rehearsal.result import Leg, Result, Row
from skyspot.rehearsal.summary import summary
from skyspot.rehearsal.verdict import Verdict
from skyspot.rehearsal.view import table

needs_fuse = pytest.mark.skipif(
    machine.bucketfs_missing() is not None, reason=str(faultfs.missing() or machine.bucketfs_missing())
)
TASK = "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\nrun: |\n"


def result(run: str, folder: Path, *options: object) -> dict[str, Any]:
    """Rehearse a script whose result is the file `result`; the rehearsal as JSON."""
    (folder / "task.yaml").write_text(TASK + run)
    done = rehearse("task.yaml", "--compare", "result", "--processes", 1, "--json", *options, cwd=folder)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


# -- what a mount refused

DOWN = Verdict(False, True, "stays down: it failed.\nexit 1")
SEEK = Refusal(manners.SEEK, "a.pt", "s3", 1)


@pytest.mark.parametrize("what", REMEDIES)
def test_every_refusal_has_its_words_and_its_remedy(what: str) -> None:
    for name, kind in MANNERS.items():
        if what in kind.refuses:
            call = Call(0, 0.0, "open", "own/a", error=kind.refuses[what], refused=what)
            [found] = refusals([call, Call(1, 0.0, "open", "own/b")], name, "/other/")
            assert found.text.startswith(f"a mount like {name} refused an operation ({what}) on /other/own/a: ")
            assert found.cause.finding.remedy == REMEDIES[what]


def test_a_failure_is_put_down_to_a_refusal_before_what_was_read_before_the_strike() -> None:
    seen, struck = Cause("a.pt was half written", remedies.HALF_WRITTEN), Row(1, "torn", "torn")
    refused = advice.after_failure(DOWN, [SEEK], seen, struck)
    assert refused.text == (
        "stays down: it failed. Likely cause: a mount like s3 refused an operation (seek back) on a.pt: Operation not "
        "permitted\nexit 1"
    )
    assert refused.remedy == REMEDIES[manners.SEEK]
    read = advice.after_failure(DOWN, [], seen, struck)
    assert (read.text, read.remedy) == (
        "stays down: it failed. Likely cause: a.pt was half written\nexit 1", remedies.HALF_WRITTEN.remedy
    )  # fmt: skip
    assert advice.after_failure(DOWN, [], None, struck).remedy == remedies.HALF_WRITTEN.remedy
    assert advice.after_failure(DOWN, [], None, Row(1, "kill", "killed")) == DOWN
    assert advice.after_failure(DOWN, [], None, None) == DOWN


def test_an_early_exit_with_0_is_the_cause_of_a_wrong_result_or_else_a_note() -> None:
    early = advice.exited_early([Row(1, "kill", "killed"), Row(2, "finished", "exited with 0 at x", exited_early=True)])
    assert early
    wrong = advice.with_exit(Verdict(False, True, "NOT exact: a is missing"), early)
    text = "attempt 2 exited with 0 at x, so that SkyPilot would mark this SUCCEEDED"
    assert (wrong.text, wrong.remedy) == (
        f"NOT exact: a is missing. Likely cause: {text}", remedies.EXITED_WITH_0.remedy
    )  # fmt: skip
    unknown = advice.with_exit(Verdict(False, False, "not checked: x"), early)
    assert (unknown.text, unknown.notes) == (
        "not checked: x", (f"{text}. Remedy: {remedies.EXITED_WITH_0.remedy}.",)
    )  # fmt: skip
    assert advice.exited_early([Row(1, "finished", "finished")]) is None


def test_a_refusal_that_a_task_survived_is_noted_once_beside_a_verdict_that_is_not_exact() -> None:
    found = advice.with_refusals(DOWN, [SEEK, SEEK])
    assert found.notes == (f"{SEEK.text}. Remedy: {REMEDIES[manners.SEEK]}.",)
    exact = Verdict(True, True, "byte-identical")
    assert advice.with_refusals(exact, [SEEK]) == exact


@needs_fuse
def test_a_refusal_of_the_undisturbed_run_is_its_cause(tmp_path: Path) -> None:
    code = "f = open('/checkpoints/a', 'wb'); f.write(b'aa'); f.flush(); f.seek(0); f.write(b'b'); f.close()"
    found = result(f'  python -c "{code}"\n', tmp_path, "--mount-like", "s3")
    verdict = found["legs"][0]["verdict"]
    assert verdict["text"].startswith(
        "not checked: the task failed without a preemption. Likely cause: a mount like s3 refused an operation (seek "
        "back) on a: Operation not permitted\nexit 1\n  PermissionError: "
    )
    assert verdict["remedy"] == REMEDIES[manners.SEEK]


@needs_fuse
def test_a_refusal_after_a_preemption_is_its_cause(tmp_path: Path) -> None:
    """A log is appended to: the second attempt fails, as the file is in the bucket then."""
    run = f"  set -e\n  echo begun >> /checkpoints/log\n{trains()}  cp /checkpoints/n /checkpoints/result\n"
    found = result(run, tmp_path, "--mount-like", "s3", "--kinds", "kill", "--preemptions", 1)
    verdict = found["legs"][1]["verdict"]
    assert verdict["text"].startswith("stays down: ")
    assert (
        "Likely cause: a mount like s3 refused an operation (append) on log: Operation not permitted\n"
        in (verdict["text"])
    )
    assert verdict["remedy"] == REMEDIES[manners.APPEND]


@needs_fuse
def test_a_refusal_that_was_swallowed_is_noted(tmp_path: Path) -> None:
    run = "  for i in $(seq 9); do sleep 0.1; ln -sf n /checkpoints/latest; done\n  echo > /checkpoints/result\n"
    found = result(run, tmp_path, "--mount-like", "s3", "--kinds", "kill", "--preemptions", 1)
    verdict = found["legs"][1]["verdict"]
    assert verdict["text"].startswith("not checked: the task saves nothing before its end")
    assert verdict["remedy"] == remedies.NEVER_SAVES.remedy
    [note] = [note for note in verdict["notes"] if "refused" in note]
    assert note.startswith("a mount like s3 refused an operation (symbolic link) on latest: Operation not permitted. ")
    assert REMEDIES[manners.SYMLINK] in note


# -- what an attempt did


def saves(fs: Fs, first: int = 1, last: int = 4) -> None:
    """A step in a second; a save after each, of two files."""
    for step in range(first, last + 1):
        fs.tick()
        fs.write(f"ckpt-{step}/a.pt", step)
        fs.write(f"ckpt-{step}/b.pt", step)
    if last == 4:
        fs.write("result.json", last)


def starts_over(fs: Fs, last: int) -> None:
    """It reads nothing."""
    saves(fs, 1, last)
    fs.tick(0.5)
    fs.take()


def filled(*scripts: Callable[[Fs], None], noticed_s: float | None = None, kind: str = "kill") -> list[Row]:
    """The rows of a leg's attempts; the last one got a notice this many seconds before its end."""
    found, fs = Evidence(("result.json",)), Fs()
    found.add("reference", Fs().attempt(saves))
    rows = []
    for number, script in enumerate(scripts, start=1):
        attempt = fs.attempt(script)
        if noticed_s is not None and number == len(scripts):
            assert attempt.ended_s
            attempt = replace(attempt, noticed_s=attempt.ended_s - noticed_s)
        found.add("preempted", attempt)
        row = Row(number, kind, kind)
        times.fill_from_trace(row, attempt, found.lives("preempted")[-1])
        rows.append(row)
    return rows


def test_a_row_tells_what_lay_in_the_bucket_and_what_was_lost() -> None:
    def cut(fs: Fs) -> None:
        saves(fs, 1, 2)
        fs.tick(0.7)
        fs.write("ckpt-3/a.pt", 3)
        fs.take()

    [row] = filled(cut)
    assert row.there == "ckpt 2, part of ckpt 3"
    assert row.unsaved_s == pytest.approx(0.8, abs=0.1)
    assert (row.again_files, row.again_s, row.last_write_s) == (0, 0, None)
    [row] = filled(lambda fs: fs.take())
    assert (row.there, row.unsaved_s) == ("nothing", 2.1), "all of it"


def test_a_start_that_shows_nothing_of_the_strike_before_says_why() -> None:
    def goes_on(fs: Fs) -> None:
        done = fs.list("ckpt-.*/a.pt")
        first = int(re.findall(r"\d+", done[-1])[0]) if done and fs.read(done[-1]) else 0
        saves(fs, first + 1, 4)

    assert filled(lambda fs: starts_over(fs, 2), goes_on)[1].unproven == ""
    assert filled(lambda fs: fs.take(), goes_on)[1].unproven == "no checkpoint was complete"
    assert filled(lambda fs: starts_over(fs, 4), goes_on)[1].unproven == "nothing was left to do"


def test_a_strike_at_the_upload_of_a_save_shows_nothing_if_a_newer_one_was_complete() -> None:
    known = Evidence(("result.json",))
    known.add("reference", Fs().attempt(saves))
    attempt = Fs().attempt(lambda fs: starts_over(fs, 3))
    known.add("preempted", attempt)
    [life] = known.lives("preempted")
    for step in (1, 2, 3):
        struck = Call(len(attempt.calls), 9.0, "upload", f"ckpt-{step}/a.pt", struck="before")
        assert times.is_passed_by(replace(attempt, calls=[*attempt.calls, struck]), life) == (step < 3)
    assert not times.is_passed_by(attempt, life)
    rows = [Row(1, "torn", "too late", hit=False, place="before x")]
    found = by_kind.table([Leg("preempted", "Preempted", finished=True, rows=rows)], ["torn", "kill"], {})
    assert [(one.outcome, one.why) for one in found] == [
        ("not tried", "too late"), ("not tried", "the run was over before")
    ]  # fmt: skip


def test_what_is_written_again_is_counted_and_its_time_is_the_undisturbed_runs() -> None:
    first, second = filled(lambda fs: starts_over(fs, 3), lambda fs: starts_over(fs, 2))
    assert (first.again_files, first.again_s) == (0, 0)
    assert second.again_files == 4
    assert second.again_s == pytest.approx(2 + 2, abs=0.2), "two steps, and 2 s to start"
    total = attempts.done_again([first, second]) or ""
    assert total.startswith("lost since the last save or start: 1.")
    assert re.search(r" s; checkpoints written again: 4 files \(4\.\d s undisturbed\)$", total)


def test_a_row_tells_the_time_from_a_notice_to_the_last_write() -> None:
    [row] = filled(lambda fs: starts_over(fs, 2), noticed_s=1.0, kind="sigterm")
    assert row.last_write_s == pytest.approx(0.4, abs=0.05), "it ends 0.6 s after its last save"
    [row] = filled(lambda fs: starts_over(fs, 2), noticed_s=0.3, kind="sigterm")
    assert row.last_write_s is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row(1, "kill", "killed", there="save 1"), "killed"),
        (Row(1, "finished", "finished", there="save 1", exit_code=0), "finished"),
        (Row(1, "sigterm", "SIGTERM", exit_code=143), "SIGTERM; exited with 143"),
        (Row(1, "sigterm", "SIGTERM, exited with 1", exit_code=1), "SIGTERM, exited with 1"),
        (
            Row(1, "aws-notice", "spot notice", there="save 1", last_write_s=0.25),
            "spot notice; last write 0.2 s later; then killed",
        ),
        (
            Row(1, "sigterm", "SIGTERM", there="save 1", exit_code=3),
            "SIGTERM; nothing written since; exited with 3",
        ),
    ],
)
def test_how_an_attempt_ended_has_what_it_did_after_a_warning(row: Row, said: str) -> None:
    assert attempts.ended(row) == said


def test_the_table_has_times_for_a_task_without_records_and_steps_for_one_with() -> None:
    own = [Row(1, "kill", "killed", resumed="nothing", after_s=1.24, there="save 2", unsaved_s=0.5)]
    assert attempts.table(own) == (
        ["", "how it ended", "after", "resumed from", "in the bucket"], [["1", "killed", "1.2 s", "nothing", "save 2"]]
    )  # fmt: skip
    assert attempts.lines(own) == ["attempt 1: killed; after: 1.2 s; resumed from: nothing; in the bucket: save 2"]
    ours = [Row(1, "kill", "killed", first_step=1, last_step=9, lost_steps=2, after_s=1.24)]
    assert attempts.table(ours)[0] == ["", "how it ended", "steps\ndone", "lost"]
    assert attempts.done_again(ours) is None


@pytest.mark.parametrize("columns", ["80", "100", "140"])
def test_the_table_fits_a_terminal_and_loses_nothing(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    where = "killed in the middle of the write to own/checkpoints/checkpoint-4000/optimizer.pt at 0"
    rows = [
        Row(9, "torn", where, after_s=3600.0, resumed="save 9, read and started over", there="save 9, part of save 10")
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=int(columns))
    console.print(table(rows))
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    assert max(map(len, text.splitlines())) <= int(columns)
    cells = re.sub(r"\s", "", text)
    assert "…" not in cells
    assert len(cells) == len("".join(re.sub(r"\s", "", word) for part in attempts.table(rows) for word in flat(part)))


def flat(part: object) -> list[str]:
    return [part] if isinstance(part, str) else [word for one in part for word in flat(one)]  # type: ignore[attr-defined]


def test_every_report_has_the_attempts() -> None:
    rows = [Row(1, "kill", "killed|<b>", after_s=1.24, resumed="nothing", there="save 2", unsaved_s=0.5)]
    rows.append(Row(2, "finished", "finished", after_s=2.0, resumed="save 2", there="save 4", again_files=0))
    leg = Leg("preempted", "Preempted", 1, rows=rows, finished=True, verdict=Verdict(True, True, "byte-identical"))
    found = Result([leg], [], 1.0)
    again = "lost since the last save or start: 0.5 s; checkpoints written again: none"
    [output] = ET.fromstring(junit("own", found)).iter("system-out")
    assert output.text == "\n".join(["Preempted", "byte-identical", *attempts.lines(rows), again])
    assert summary("own", found).endswith(
        "\n\n<details><summary>Preempted: 1 preemption</summary>\n\n"
        "|  | how it ended | after | resumed from | in the bucket |\n| --- | --- | --- | --- | --- |\n"
        "| 1 | killed\\|\\<b\\> | 1.2 s | nothing | save 2 |\n| 2 | finished | 2.0 s | save 2 | save 4 |\n"
        f"\n{again}\n\n</details>\n"
    )
    told = found.to_json()["legs"][0]["rows"][0]
    assert {key: told[key] for key in ("after_s", "there", "unsaved_s", "exit_code", "last_write_s")} == {
        "after_s": 1.24, "there": "save 2", "unsaved_s": 0.5, "exit_code": None, "last_write_s": None,
    }  # fmt: skip


@needs_fuse
def test_a_rehearsal_tells_of_each_attempt_when_it_was_struck_and_what_it_left(tmp_path: Path) -> None:
    trap = "  trap 'echo x > /checkpoints/at-term; exit 7' TERM\n"
    run = f"{trap}{trains(steps=40)}  cp /checkpoints/n /checkpoints/result\n"
    found = result(run, tmp_path, "--mount-like", "local", "--kinds", "sigterm,kill-in-save", "--preemptions", 2)
    warned, in_save, finished = found["legs"][1]["rows"]
    assert warned["exit_code"] == 7
    assert 0 <= warned["last_write_s"] < 5
    resumed = int(in_save["resumed"].removeprefix("save "))
    assert in_save["there"] == f"save {resumed + 1}, part of save {resumed + 2}", "struck in its second save"
    assert in_save["exit_code"] is None
    assert finished["exit_code"] == 0
    assert all(row["after_s"] > 0 for row in (warned, in_save, finished))
