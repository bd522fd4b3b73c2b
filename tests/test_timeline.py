"""The timeline of a run: its pieces add up to the report's sums; how a terminal and JSON show it."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from crafted import NOON, CraftedAttempt, three_attempts
from crafted_training import training
from odd_records import odd_records
from rich.console import Console
from support import mlp

from skyspot.cli import report_tables
from skyspot.cli.report import report as command
from skyspot.money.report import Given, Report, report_of
from skyspot.money.timeline import Band, Piece, cells, coarse, timeline_of, to_json
from skyspot.runs.records import read_records
from trainer.layout.names import RunPaths

LATER = NOON + 1e8


def bands_of(root: Path, now: float = LATER) -> tuple[tuple[Band, ...], Report]:
    records = read_records(RunPaths(root))
    report = report_of(records, Given(now, {}, {}))
    return timeline_of(records, report), report


def assert_adds_up(bands: tuple[Band, ...], report: Report, tolerance_s: float = 1e-6) -> None:
    """Each attempt's pieces follow each other without a gap, and add up to its times."""
    at = 0.0
    for band, one in zip(bands, report.attempts, strict=True):
        sums = dict.fromkeys(asdict(one.times), 0.0)
        for piece in band.pieces:
            assert piece.start_s == pytest.approx(at, abs=1e-9)
            assert piece.end_s > piece.start_s
            sums[piece.kind] += piece.seconds
            at = piece.end_s
        assert (band.end_s, sums) == (pytest.approx(at), pytest.approx(asdict(one.times), abs=tolerance_s))


def test_the_pieces_of_each_attempt_add_up_to_its_times(tmp_path: Path) -> None:
    three_attempts(tmp_path / "few")
    assert_adds_up(*bands_of(tmp_path / "few"))
    assert_adds_up(*bands_of(training(tmp_path / "many")), tolerance_s=1e-3)


def test_the_pieces_of_a_real_run_add_up_to_its_times(run_dir: Path) -> None:
    assert mlp(run_dir, "--fault", "sigterm@9", grace=120).code == 75
    assert_adds_up(*bands_of(run_dir), tolerance_s=0.05)


def test_pieces_stand_where_their_time_was_spent(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    bands, _ = bands_of(tmp_path)
    assert [(one.kind, round(one.start_s, 3), round(one.end_s, 3)) for one in bands[1].pieces] == [
        ("waiting", 106.5, 306.5), ("setup", 306.5, 409.5), ("restore", 409.5, 410.5), ("setup", 410.5, 412.5),
        ("productive", 412.5, 422.5), ("lost", 422.5, 428.5), ("other", 428.5, 429.0),
    ]  # fmt: skip
    assert bands[1].steps[0] == (pytest.approx(414.5), 11)
    assert [one.kind for one in bands[0].pieces[-2:]] == ["saving", "other"]


def test_odd_records_give_pieces_that_follow_each_other(tmp_path: Path) -> None:
    odd = [None, True, "x", -1, 0, 10**400, 1e308, math.nan, [], {}, 1.5, 900.0, 3]
    for records in odd_records(tmp_path, 7, odd, 200):
        report = report_of(records, Given(LATER, {}, {}))
        bands = timeline_of(records, report)
        assert bands[-1].end_s == pytest.approx(report.times.total, rel=1e-6, abs=1e-3)
        for band in bands:
            assert all(one.end_s > one.start_s for one in band.pieces)
            assert all(0 <= at <= band.end_s for at, _ in band.steps)
        json.dumps(to_json(bands), allow_nan=False)


def test_a_cell_is_what_took_most_of_it_and_lost_steps_are_never_hidden() -> None:
    pieces = [Piece("setup", 0, 6), Piece("productive", 6, 39), Piece("lost", 39, 40.5), Piece("waiting", 40.5, 50)]
    assert cells(pieces, 0, 10, 6) == ["setup", "productive", "productive", "lost", "lost", ""]
    assert cells(pieces, 20, 10, 1) == ["productive"]


def test_a_timeline_of_many_pieces_is_thinned_and_keeps_its_ends(tmp_path: Path) -> None:
    bands, _ = bands_of(training(tmp_path, steps=20_000, step_s=2.0, attempts=3, save_every=500))
    assert sum(len(band.pieces) for band in bands) > 20_000
    for band in bands:
        few = coarse(band, bands[-1].end_s / 300)
        assert len(few.pieces) <= 310
        assert (few.pieces[0].start_s, few.pieces[-1].end_s) == (band.start_s, band.end_s)
        seconds = math.fsum(one.seconds for one in few.pieces if one.kind == "productive")
        assert seconds == pytest.approx(
            math.fsum(one.seconds for one in band.pieces if one.kind == "productive"), rel=0.1
        )
    assert len(json.dumps(to_json(bands))) < 200_000


# -- in a terminal -----------------------------------------------------------------------------------------------------


def shown(root: Path, width: int, **env: str) -> list[str]:
    done = CliRunner(env={"COLUMNS": str(width), **env}).invoke(command, [str(root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("Timeline"))
    last = next(number for number, line in enumerate(lines) if line.startswith(("Goodput", "Spend")))
    return lines[first:last]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_each_attempt_has_a_bar_on_one_scale_that_fits_the_terminal(tmp_path: Path, width: int) -> None:
    three_attempts(tmp_path)
    lines = shown(tmp_path, width)
    assert all(len(line) <= width for line in lines)
    bars = [line[12:].split() for line in lines[:3]]
    assert [number for number, _ in bars] == ["1", "2", "3"]
    first, second, third = (bar for _, bar in bars)
    assert len(second) == width - 15, "the longest one"
    assert len(first) == pytest.approx(len(second) * 106.5 / 322.5, abs=1)
    assert second.lstrip(".").strip("s").rstrip("-")[-1] == "x", "it ended with lost steps"
    assert "x" not in first + third
    for bar, start in ((first, "s"), (second, "."), (third, ".")):
        assert bar[0] == start
        assert "#" in bar
    assert " ".join(lines[3].split()).startswith(". waiting for a machine, s set-up")
    assert f"a character is {322.5 / (width - 15):.1f} s" in " ".join(lines[-1].split())


def test_many_attempts_share_one_bar(tmp_path: Path) -> None:
    training(tmp_path, attempts=40, steps=2400)
    lines = shown(tmp_path, 80)
    assert len(lines[0]) == 79
    assert all(mark in lines[0] for mark in ".s#x")
    assert lines[1].startswith(" " * 13)


def test_one_attempt_that_has_just_begun_has_a_bar(tmp_path: Path) -> None:
    CraftedAttempt(tmp_path, 1, NOON).start(setup_s=60, since_setup_s=1.0)
    assert shown(tmp_path, 80)[0].split() == ["Timeline", "1", "s" * 65]
    CraftedAttempt(tmp_path / "at-once", 1, NOON).start()
    bands, _ = bands_of(tmp_path / "at-once")
    assert (bands[0].pieces, to_json(bands)[0]["end_s"]) == ((), 0.0), "its first record is its last"


def test_colours_are_left_out_where_they_are_not_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The characters are the same with colours and without, and are in every encoding."""
    three_attempts(tmp_path)
    bands, report = bands_of(tmp_path)
    found = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(report_tables, "Console", lambda **given: Console(force_terminal=True, width=80, **given))
        report_tables.show(report, bands)
        found[no_color] = capsys.readouterr().out
    assert "\x1b[31mx" in found[""]
    assert "\x1b[3" not in found["1"]
    assert found["1"].isascii()


def test_json_has_the_timeline(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    done = CliRunner().invoke(command, [str(tmp_path), "--json"], catch_exceptions=False)
    found = json.loads(done.output)
    assert [one["attempt"] for one in found["timeline"]] == [1, 2, 3]
    assert found["timeline"][1]["pieces"][0] == ["waiting", 106.5, 306.5]
    assert found["timeline"][-1]["end_s"] == pytest.approx(found["times"]["total"])
