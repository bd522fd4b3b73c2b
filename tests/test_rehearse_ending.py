"""The report at the end of a rehearsal: of its preempted run, at stated prices; it never changes the verdict.

The figures of a real rehearsal are compared with its raw files in test_rehearse.py.
"""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from crafted import NOON, CraftedAttempt, three_attempts
from support import REPO
from support_rehearse import rehearse

from skyspot.cli import ending
from skyspot.cli.rehearse import rehearse as command
from skyspot.errors import UsageError
from skyspot.money.spend import read_prices
from skyspot.rehearsal.left_records import NO_RECORDS, NOT_PREEMPTED, left_records
from skyspot.rehearsal.reports import Reports
from skyspot.rehearsal.result import Leg, Result
from trainer.layout.names import RunPaths

TASK = 'resources: {accelerators: "A100:8", use_spot: true, infra: aws}\nrun: python train.py\n'
PRICES = "prices: [{accelerators: 'A100:8', infra: aws/us-east-1, spot: 9.83, on_demand: 32.77}]\n"
# Of the three attempts: their node time, with 60 s for the second one on two nodes, and what on-demand needs.
NODE_S, NEEDED_S = 106.5 + (122.5 + 60) * 2 + 117, 79.5 + 18.5 + 1 + 3 + 10 * 2 + 10


def legs_of(folder: Path, *names: str) -> SimpleNamespace:
    """The legs of a rehearsal in a folder, with their runs."""
    runs = {name: RunPaths(folder / name / "bucket" / "own") for name in names}
    found = [Leg(name, name.title(), seconds=800.0) for name in names]
    return SimpleNamespace(all=found, paths=lambda name: runs[name] if runs[name].attempts.is_dir() else None)


def rehearsed(folder: Path) -> Result:
    """A rehearsal whose undisturbed run has one attempt of 5 s, and its preempted run three."""
    one = CraftedAttempt(folder / "reference" / "bucket" / "own", 1, NOON)
    one.start()
    one.end(5, "finished", 0)
    three_attempts(folder / "preempted" / "bucket" / "own")
    legs = legs_of(folder, "reference", "preempted")
    records, why = left_records(legs, gone=folder)  # type: ignore[arg-type]
    assert not why
    return Result(legs.all, [], 900.0, records=records)


def shown(result: Result, capsys: pytest.CaptureFixture[str], *, as_json: bool = False, **asked: object) -> str:
    reports = Reports(**asked)  # type: ignore[arg-type]
    ending.show(ending.ending_of(result, TASK, reports), reports, as_json)
    printed = capsys.readouterr()
    assert not as_json or not printed.out
    return printed.out + printed.err


def money(usd_per_hour: float, on_demand: float) -> tuple[str, str]:
    return f"USD {NODE_S / 3600 * usd_per_hour:.2f}", f"USD {NEEDED_S / 3600 * on_demand:.2f}"


def test_stated_prices_give_the_spend_and_the_saving_of_the_preempted_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(rehearsed(tmp_path), capsys, prices=read_prices("9.83,32.77"))
    lines = text.splitlines()
    assert lines[0] == "Report of the preempted run:"
    assert [line.split()[0] for line in lines[1:4]] == ["Timeline", "2", "3"]
    usd, on_demand = money(9.83, 32.77)
    assert re.search(rf"^Spend +{usd} for 0.163 node-hours \(prices: --prices\)$", text, re.M)
    assert re.search(rf"^On demand +{on_demand} for ", text, re.M)
    assert f"more than on-demand would have: {usd} instead of {on_demand}." in text
    assert "Other time   waiting for a machine 53.6% (6 min 40 s)," in text
    assert lines[-1].startswith("Note: A rehearsal takes its machine far more often than a cloud does, and 60 s are")
    assert "Goodput" not in text, "its leg has shown it"
    example = (REPO / "docs" / "rehearse.md").read_text().partition("```text\nReport of")[2].partition("```")[0]
    named = [line.partition("  ")[0] for line in lines[1:-1] if not line.startswith("  ")]
    assert [line.partition("  ")[0] for line in example.splitlines()[1:-2] if not line.startswith("  ")] == named


def test_prices_of_skyspot_yaml_count_without_stated_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = rehearsed(tmp_path)
    assert shown(result, capsys) == "", "no price is known and nothing was asked for"
    (tmp_path / "skyspot.yaml").write_text(PRICES)
    assert f"{money(9.83, 32.77)[0]} for 0.163 node-hours (prices: skyspot.yaml, rung 1: A100:8)" in shown(
        result, capsys
    )
    assert f"{money(1, 2)[0]} for 0.163 node-hours (prices: --prices)" in shown(
        result, capsys, prices=read_prices("1,2")
    )
    (tmp_path / "skyspot.yaml").write_text(PRICES.replace("A100", "L4"))
    assert shown(result, capsys) == "", "a price of another machine"
    (tmp_path / "skyspot.yaml").write_text("prices: 3\n")
    assert shown(result, capsys) == "", "a mistake there does not fail what has ended"


def test_the_page_is_that_of_the_preempted_run_and_json_has_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    result, html = rehearsed(tmp_path), tmp_path / "page.html"
    text = shown(result, capsys, html=html)
    assert "no price is known; 0.163 node-hours. --prices SPOT,ONDEMAND states one" in " ".join(text.split())
    assert text.splitlines()[-1] == f"Page: {html}"
    page = html.read_text()
    assert "finished, step 20 of 20; 3 attempts, 2 preemptions" in page
    assert "preempted/bucket/own" in page
    assert str(tmp_path) not in page, "that folder is gone"
    assert "A rehearsal takes its machine far more often" in page
    assert shown(result, capsys, html=html, as_json=True) == f"Page: {html}\n"
    last = ending.ending_of(result, TASK, Reports(prices=read_prices("9.83,32.77")))
    report = json.loads(json.dumps(last.document, allow_nan=False))
    assert (report["preemptions"], report["lost_steps"], len(report["timeline"])) == (2, 3, 3)
    assert report["spend"]["usd"] == pytest.approx(NODE_S / 3600 * 9.83)
    assert report["spend"]["on_demand_usd"] == pytest.approx(NEEDED_S / 3600 * 32.77)


def test_an_attempt_without_an_end_does_not_run_any_more_when_the_rehearsal_is_over(tmp_path: Path) -> None:
    one = CraftedAttempt(tmp_path / "preempted" / "bucket" / "own", 1, NOON)
    one.start()
    legs = legs_of(tmp_path, "preempted")
    records, _ = left_records(legs, gone=None)  # type: ignore[arg-type]
    last = ending.ending_of(Result(legs.all, [], 1.0, records=records), TASK, Reports())
    assert last.report
    assert (last.report.state, last.report.root) == ("silent", str(tmp_path / "preempted" / "bucket" / "own"))


def test_what_is_missing_is_said_where_a_report_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "page.html"
    for names, why in ((["reference"], NOT_PREEMPTED), (["reference", "preempted"], NO_RECORDS)):
        records, unrecorded = left_records(legs_of(tmp_path, *names), gone=tmp_path)  # type: ignore[arg-type]
        assert (records, unrecorded) == (None, why)
        result = Result([], [], 1.0, unrecorded=unrecorded)
        assert shown(result, capsys, html=html) == f"No report: {why}.\n"
        assert shown(result, capsys, html=html, as_json=True) == f"No report: {why}.\n"
        assert shown(result, capsys) == ""
    assert not html.exists()


def test_nothing_about_the_report_fails_a_rehearsal_that_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, prices = rehearsed(tmp_path), read_prices("1,2")
    broken = dataclasses.replace(result, records=object())  # type: ignore[arg-type]
    assert shown(broken, capsys, prices=prices).startswith("No report: AttributeError: ")
    assert ending.ending_of(broken, TASK, Reports()).document is None
    unreadable = SimpleNamespace(all=result.legs, paths=lambda _: SimpleNamespace(root=tmp_path))
    assert left_records(unreadable, gone=None)[1].startswith("AttributeError: ")  # type: ignore[arg-type]
    pytest.importorskip("matplotlib")
    text = shown(result, capsys, html=tmp_path / "gone" / "page.html")
    assert text.splitlines()[-1].startswith("No page: --html: ")
    assert text.splitlines()[-1].endswith("cannot be written: No such file or directory")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--html", "gone/page.html"], "--html: there is no folder"),
        (["--html", "page", "--summary", "./page"], "--summary and --html are both page; name two files"),
        (["--prices", "1"], "--prices: '1' is not SPOT,ONDEMAND"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(
    tmp_path: Path, options: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--html" in options:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(f"run: touch {tmp_path}/ran\n")
    with pytest.raises(UsageError, match=re.escape(error)):
        CliRunner().invoke(command, ["task.yaml", *options], catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["task.yaml"]


def test_a_task_without_records_has_the_same_exit_status_and_a_line(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("run: exit 3\n")
    done = rehearse("task.yaml", "--prices", "1,2", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"No report: {NOT_PREEMPTED}.\n")
    assert json.loads(done.stdout)["report"] is None
