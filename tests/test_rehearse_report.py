"""What a rehearsal writes for continuous integration."""

import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import faultfs
import pytest
from support import clean_env
from support_rehearse import leftovers, rehearse

from skyspot.cli.rehearse import rehearse as rehearse_command
from skyspot.cli.reporting import arguments
from skyspot.errors import SkyspotError, UsageError
from skyspot.rehearsal import machine, tracing
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.evidence import Place
from skyspot.rehearsal.junit import junit
from skyspot.rehearsal.remedies import MIXED
from skyspot.rehearsal.reports import Reports
from skyspot.rehearsal.repro import Repro, reproduced
from skyspot.rehearsal.result import Kind, Leg, Result, Row, Settings, check_settings
from skyspot.rehearsal.summary import fenced, plain, summary
from skyspot.rehearsal.verdict import Verdict

HOSTILE = "a<b>&\"'\x1b[31m]]>\x00\r\udc80\ufffe|`*_[x](y)\n```\n</text>"
SHOWN = "a<b>&\"'\\x1b[31m]]>\\x00\\r\\udc80\\ufffe|`*_[x](y)\n```\n</text>"
"""The same as the files show it."""


def exact() -> Result:
    verdict = Verdict(True, True, "byte-identical: 1 file", notes=("a note",))
    legs = [Leg("reference", "Undisturbed"), Leg("preempted", "Preempted", seconds=2.5, verdict=verdict)]
    return Result(legs, ["one more"], 3.5, kinds=[Kind("kill", "exact", "killed"), Kind("torn", "not tried", "short")])


def failed(text: str = HOSTILE) -> Result:
    verdicts = [
        Verdict(False, True, f"stays down: it failed.\n{text}"),
        Verdict(False, True, "LOST WORK: in attempt 2"),
    ]
    legs = [Leg(f"leg-{number}", text, verdict=one) for number, one in enumerate(verdicts)]
    return Result(legs, [text], 3.5, kinds=[Kind("kill-in-save", "stays down", text), Kind("kill", "exact", text)])


def case(document: bytes, name: str) -> ET.Element:
    (found,) = [one for one in ET.fromstring(document).iter("testcase") if one.get("name") == name]
    return found


def counts(document: bytes) -> dict[str, str | None]:
    root = ET.fromstring(document)
    names = ("tests", "failures", "errors", "skipped")
    found = {name: root.get(name) for name in names}
    assert found == {name: root[0].get(name) for name in names}
    return found


def test_each_kind_and_each_judged_leg_is_a_test_case() -> None:
    document = junit("own", exact())
    assert counts(document) == {"tests": "3", "failures": "0", "errors": "0", "skipped": "1"}
    assert [one.get("name") for one in ET.fromstring(document).iter("testcase")] == ["kill", "torn", "preempted"]
    skipped = case(document, "torn").find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "not tried: short"
    assert case(document, "preempted").get("time") == "2.5"


def test_what_is_not_exact_is_a_failure_and_any_text_can_be_read_back() -> None:
    document = junit("own", failed())
    assert counts(document) == {"tests": "4", "failures": "3", "errors": "0", "skipped": "0"}
    failure = case(document, "leg-0").find("failure")
    assert failure is not None
    assert failure.attrib == {"type": "stays down", "message": "stays down: it failed."}
    assert failure.text == f"stays down: it failed.\n{SHOWN}"
    failure = case(document, "kill-in-save").find("failure")
    assert failure is not None
    assert failure.text == f"stays down: {SHOWN}"
    failure = case(document, "leg-1").find("failure")
    assert failure is not None
    assert failure.get("type") == "LOST WORK"
    assert ET.fromstring(document)[0].findtext("system-out") == SHOWN


@pytest.mark.parametrize("number", range(0, 0x10000, 0x1000))
def test_every_character_can_be_written(number: int) -> None:
    text = "".join(map(chr, range(number, number + 0x1000)))
    document = junit(text, failed(text))
    ET.fromstring(document)
    summary(text, failed(text)).encode()


def test_a_result_that_was_not_checked_does_not_pass() -> None:
    result = Result([Leg("reference", "Undisturbed", verdict=Verdict(False, False, "not checked: it failed"))], [], 1.0)
    assert counts(junit("own", result))["failures"] == "1"
    assert summary("own", result).startswith("### skyspot rehearse own: **not checked**\n")


def test_the_summary_has_the_verdict_the_table_and_each_text_once() -> None:
    result = exact()
    result.legs += [Leg("preempted-2", "Preempted again", verdict=result.legs[1].verdict)]
    assert summary("own", result) == (
        "### skyspot rehearse own: exact\n\n"
        "| kind | verdict | what was struck |\n| --- | --- | --- |\n"
        "| kill | exact | killed |\n| torn | not tried | short |\n\n"
        "**Preempted:** byte-identical: 1 file\n\n"
        "- a note\n- one more\n"
    )


def test_no_text_breaks_out_of_the_summary() -> None:
    text = summary("own", failed("```\n````sh\n<script>| x\n`````"))
    assert text.startswith("### skyspot rehearse own: **NOT exact**\n")
    assert "\n\n``````text\n```\n````sh\n<script>| x\n`````\n``````\n" in text
    outside = re.sub(r"(`{6})text\n.*?\n\1\n", "", text, flags=re.DOTALL)
    assert "<script>" not in outside
    assert not re.search(r"(?<!\\)`", outside)
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4] * 4
    assert plain(HOSTILE).count("\n") == 0
    assert fenced("plain") == "```text\nplain\n```"


def test_the_summary_is_appended_and_junit_replaced(tmp_path: Path) -> None:
    reports = Reports(tmp_path / "junit.xml", tmp_path / "summary.md")
    (tmp_path / "summary.md").write_text("another step")
    (tmp_path / "junit.xml").write_text("old" * 10_000)
    reports.begin("own")
    assert counts((tmp_path / "junit.xml").read_bytes())["errors"] == "1"
    assert (tmp_path / "summary.md").read_text() == "another step"
    reports.write("own", exact())
    assert (tmp_path / "junit.xml").read_bytes() == junit("own", exact())
    assert (tmp_path / "summary.md").read_text() == "another step\n\n" + summary("own", exact())
    reports.write("own", exact())
    assert (tmp_path / "summary.md").read_text().count("### skyspot rehearse own: exact\n") == 2


def test_without_files_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Reports().begin("own")
    Reports().write("own", exact())
    assert not list(tmp_path.iterdir())


def test_a_file_that_can_no_longer_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SkyspotError, match=r"^/.*/gone/summary.md: No such file or directory$"):
        Reports(summary=tmp_path / "gone" / "summary.md").write("own", exact())


@pytest.mark.parametrize("option", ["--junit", "--summary"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path, option: str) -> None:
    (tmp_path / "task.yaml").write_text(f"run: touch {tmp_path}/ran\n")
    done = rehearse("task.yaml", option, "gone/report", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: {option} gone/report: No such file or directory\n"
    assert [path.name for path in tmp_path.iterdir()] == ["task.yaml"]
    with pytest.raises(UsageError, match=rf"^{option} /proc/report: "):
        Reports(**{option[2:]: Path("/proc/report")}).begin("own")


def test_the_reports_of_a_task_that_fails(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("run: |\n  printf 'Error: \\033[31m```\\n'; exit 3\n")
    done = rehearse("task.yaml", "--junit", "junit.xml", "--summary", "summary.md", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    failure = case((tmp_path / "junit.xml").read_bytes(), "reference").find("failure")
    assert failure is not None
    assert "\nexit 3\n  Error: " in (failure.text or "")
    assert "\n````text\nexit 3\n  Error: " in (tmp_path / "summary.md").read_text()
    for path in leftovers(tmp_path):
        assert "skyspot-rehearsal-log-" in path


@pytest.mark.parametrize("other", ["report", "./report", "link"])
def test_two_reports_in_one_file_are_refused_before_anything_runs(tmp_path: Path, other: str) -> None:
    (tmp_path / "task.yaml").write_text(f"run: touch {tmp_path}/ran\n")
    (tmp_path / "link").symlink_to("report")
    done = rehearse("task.yaml", "--junit", "report", "--summary", other, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: --junit and --summary are both report; name two files\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "task.yaml"]


def test_a_remedy_is_in_every_report() -> None:
    verdict = Verdict(False, True, "stays down: it failed.\nexit 1", remedy="skip a `file`")
    result = Result([Leg("preempted", "Preempted", verdict=verdict)], [], 1.0)
    failure = case(junit("own", result), "preempted").find("failure")
    assert failure is not None
    assert failure.text == "stays down: it failed.\nexit 1\nremedy: skip a `file`"
    assert summary("own", result).endswith("\n```\n\n**Remedy:** skip a \\`file\\`\n")
    assert result.to_json()["legs"][0]["verdict"]["remedy"] == "skip a `file`"


# -- the script that repeats a row


def written(folder: Path, kind: Kind, **changes: object) -> str:
    repro = Repro(1, folder, "task.yaml --compare='a b'", "2,4")
    rows = [Row(1, "finished", "finished", **changes)]  # type: ignore[arg-type]
    line = reproduced(repro, Result([Leg("preempted", "Preempted", rows=rows)], [], 1.0, kinds=[kind]))
    assert line == f"skyspot-repro-1.sh repeats row 1 ({kind.kind}) alone."
    assert os.access(folder / "skyspot-repro-1.sh", os.X_OK)
    text = (folder / "skyspot-repro-1.sh").read_text()
    subprocess.run(["sh", "-n", folder / "skyspot-repro-1.sh"], check=True)
    assert f"\ncd {shlex.quote(str(folder))} || exit 2\n" in text
    return text.splitlines()[-1]


def test_a_repetition_has_the_rows_kind_and_place_and_the_options_of_the_rehearsal(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    place = "before the rename of it's.new to $it"
    torn = written(folder, Kind("torn", "stays down", HOSTILE, place))
    assert shlex.split(torn) == [
        "exec", "skyspot", "rehearse", "task.yaml", "--compare=a b", "--kinds=torn", "--preemptions=1", "--processes=2",
        f"--at={place}", "$@",
    ]  # fmt: skip
    assert "--preemptions=2 --processes=2 " in written(folder, Kind("kill", "NOT exact", "x"), first_step=1)
    others = written(folder, Kind("other processes", "NOT exact", "x"), first_step=1)
    assert "--kinds=sigterm --preemptions=1 --processes=2,4 " in others


def test_a_row_that_did_not_fail_has_no_script(tmp_path: Path) -> None:
    lines = [reproduced(Repro(number, tmp_path, "", "1"), exact()) for number in (1, 2, 3)]
    assert lines == [
        "--repro 1: no script, because row 1 (kill) is exact.",
        "--repro 2: no script, because row 2 (torn) is not tried.",
        "--repro 3: no script, because the table has 2 rows.",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kinds", [("kill",), ("torn", "kill-in-save")])
def test_a_place_needs_one_kind_that_falls_on_calls(kinds: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"^--at: choose the kind as well"):
        check_settings(Settings(kinds=kinds, at="before the close of a"))
    with pytest.raises(UsageError, match=r"^--at names one place; remove --every-write"):
        check_settings(Settings(kinds=("torn",), at="before the close of a", every_write=True))


def test_a_place_is_named_by_its_description_and_number() -> None:
    names = ["before the write to a at 0", "before the write to a at 0", "after the close of a"]
    places = tracing.told_apart([Place(Strike(n, "before"), Strike(n, "before"), name) for n, name in enumerate(names)])
    assert tracing.named("before the write to a at 0", places) == places[0]
    assert tracing.named("before the write to a at 0 (2)", places) == places[1]
    assert places[1].later.number == 1
    with pytest.raises(
        UsageError, match=r"^--at: a save of this task has no place 'after the clos of a'. Did you mean"
    ):
        tracing.named("after the clos of a", places)
    with pytest.raises(UsageError, match=r"has no place 'x'. Its first place: 'before the write to a at 0'$"):
        tracing.named("x", places)


def test_a_place_needs_calls_that_are_seen(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(PAIR)
    done = rehearse(
        "task.yaml", "--kinds", "torn", "--at", "x", cwd=tmp_path, env={"SKYSPOT_REHEARSE_WITHOUT_NAMESPACE": "1"}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: --at: calls on the bucket cannot be seen: ")


def test_the_command_line_is_written_down_without_what_a_repetition_chooses() -> None:
    found = []

    def show(**_: object) -> None:
        found.append(arguments(click.get_current_context()))

    command = click.Command("rehearse", params=rehearse_command.params, callback=show)
    options = [
        "my task.yaml", "-n", "run", "--prefer", "aws", "--prefer=gcp", "--no-use-spot", "--setup", "--secret", "A=b",
        "--tolerance", "1e-6", "--seed", "3", "--every-write", "--kinds", "kill", "--keep", "kept", "--junit", "j",
        "--repro", "2", "--json", "--processes", "1", "--compare", "*.json", "--env", "K=V=W",
    ]  # fmt: skip
    command.main(options, standalone_mode=False)
    assert shlex.split(found[0])[0] == "my task.yaml"
    assert sorted(shlex.split(found[0])[1:]) == [
        "--compare=*.json", "--env=K=V=W", "--name=run", "--no-use-spot", "--prefer=aws", "--prefer=gcp", "--secret=A",
        "--seed=3", "--setup", "--tolerance=1e-06",
    ]  # fmt: skip


PAIR = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
run: |
  cd /checkpoints
  n=$(cat a 2> /dev/null || echo 0)
  [ "$n" = "$(cat b 2> /dev/null || echo 0)" ] || { echo "Error: a and b are of two saves ($TOKEN)"; exit 9; }
  while [ $n -lt 10 ]; do
    n=$((n + 1)); sleep 0.03
    for file in a b; do echo $n > $file.new; mv $file.new $file; done
  done
  cp a result
"""
"""A checkpoint of two files. A kill between the two leaves a pair with which the task stays down."""


@pytest.mark.slow
def test_a_failing_row_fails_again_alone_in_the_same_way(tmp_path: Path) -> None:
    if missing := machine.bucketfs_missing():
        pytest.skip(f"rehearsals that see the bucket: {missing}" if faultfs.missing() is None else faultfs.missing())
    (tmp_path / "task.yaml").write_text(PAIR)
    done = rehearse(
        "task.yaml", "--kinds", "kill-in-save", "--preemptions", 1, "--compare", "result", "--mount-like", "local",
        "--secret", "TOKEN=hidden", "--repro", 1, "--junit", "junit.xml", "--summary", "summary.md", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    row = json.loads(done.stdout)["kinds"][0]
    place = "before the rename of b.new to b"
    assert (row["number"], row["kind"], row["outcome"], row["place"]) == (1, "kill-in-save", "stays down", place)
    assert case((tmp_path / "junit.xml").read_bytes(), "kill-in-save").find("failure") is not None
    assert "kill-in-save | stays down | " in (tmp_path / "summary.md").read_text()
    assert "skyspot-repro-1.sh repeats row 1 (kill-in-save) alone.\n" in done.stderr
    script = tmp_path / "skyspot-repro-1.sh"
    assert "hidden" not in script.read_text()
    (tmp_path / "skyspot").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m skyspot "$@"\n')
    (tmp_path / "skyspot").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    again = subprocess.run(
        [script, "--json"], env=clean_env(TMPDIR=str(tmp_path), PATH=path, TOKEN="again"), cwd="/",
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert again.returncode == 1, again.stdout + again.stderr
    result = json.loads(again.stdout)
    assert result["kinds"] == [row]
    assert "Error: a and b are of two saves (again)" in result["legs"][1]["verdict"]["text"]
    assert "Likely cause: a mixed pair of files of two saves: a of save " in result["legs"][1]["verdict"]["text"]
    assert result["legs"][1]["verdict"]["remedy"] == MIXED.remedy
