"""What a rehearsal writes for continuous integration."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support_rehearse import leftovers, rehearse

from skyspot.errors import SkyspotError, UsageError
from skyspot.rehearsal.junit import junit
from skyspot.rehearsal.reports import Reports
from skyspot.rehearsal.result import Kind, Leg, Result
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
