"""The truth about the scripts that rehearsals are tried on, found out without skyspot.

Each script is run undisturbed, struck at exact lines, started again, and its results are compared. Its cause is proved
by a cure: a change of a line or two with which the same strike is survived exactly.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import shared
import warm
from programs.scripts import truth
from programs.scripts.truth import EXACT, LOST_WORK, NOT_CHECKED, NOT_EXACT, STAYS_DOWN, TRUTHS, Moment, Truth
from support import PROGRAMS, clean_env

BY_NAME = {one.script: one for one in TRUTHS}
STRUCK = [pytest.param(one, moment, id=f"{one.script}-{number}") for one in TRUTHS
          for number, moment in enumerate(one.moments)]  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    code: int
    steps: int
    output: str


def attempt(script: Path, out: Path, moment: Moment | None = None) -> Attempt:
    """Run the script on the folder, to its end or to that moment."""
    counted = out.parent / f"{out.name}.steps"
    counted.write_bytes(b"")
    strike: list[str] = []
    if moment:
        lines = [number for number, line in enumerate(script.read_text().splitlines(), 1) if moment.line in line]
        assert len(lines) == 1, f"{moment.line!r} is in lines {lines}"
        strike = [str(lines[0]), str(moment.times), moment.signal]
    # What else happens in a step has to have its time where workers die beside it.
    pauses = "real" if moment and script.stem == "handler_workers" else "none"
    done = warm.run(
        [sys.executable, PROGRAMS / "struck.py", script, counted, pauses, *strike], env=clean_env(OUT=str(out)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, start_new_session=True,
    )  # fmt: skip
    if moment and moment.cut:
        os.truncate(out / moment.cut, (out / moment.cut).stat().st_size // 2)
    return Attempt(done.returncode, counted.stat().st_size, done.stdout)


def result(one: Truth, out: Path) -> object:
    """What its user would compare, and how."""
    data = (out / one.result).read_bytes()
    ignored = [key for option, key in zip(one.options, one.options[1:], strict=False) if option == "--ignore-key"]
    if not ignored:
        return data
    return {key: value for key, value in json.loads(data).items() if key not in ignored}


def undisturbed(script: Path, out: Path) -> Attempt:
    done = attempt(script, out)
    assert done.code == 0, done.output
    return done


@pytest.fixture
def whole(one: Truth, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """What the script leaves undisturbed, and its steps."""

    def build(empty: Path) -> None:
        undisturbed(one.path, empty / "out")

    folder = shared.built_once(tmp_path_factory, f"script-{one.script}", build)
    return folder / "out", (folder / "out.steps").stat().st_size


def struck(script: Path, out: Path, moment: Moment) -> tuple[Attempt, Attempt]:
    """The attempt that is struck, and the next one."""
    first = attempt(script, out, moment)
    assert first.code != 0, f"it was over before the strike:\n{first.output}"
    return first, attempt(script, out)


def test_each_script_has_its_truth_and_is_short() -> None:
    scripts = sorted(path for path in truth.HERE.glob("*.py") if path.name != "truth.py")
    assert [path.stem for path in scripts] == sorted(BY_NAME)
    assert len(TRUTHS) == len(BY_NAME) == 34
    for path in scripts:
        text = path.read_text()
        assert len(text.splitlines()) < 60, path.name
        assert ast.get_docstring(ast.parse(text)), path.name
        assert text.count("time.sleep(") == 1, f"{path.name}: its pause is its step"
        assert 'os.environ["OUT"]' in text, path.name
        assert "skyspot" not in text, f"{path.name} is somebody's own"


@pytest.mark.parametrize("one", TRUTHS, ids=lambda one: one.script)
def test_the_table_agrees_with_itself(one: Truth) -> None:
    verdicts = (EXACT, LOST_WORK, NOT_EXACT, STAYS_DOWN, NOT_CHECKED)
    assert one.verdict in verdicts
    assert set(one.fails) <= set(truth.KINDS)
    assert set(one.fails.values()) <= {one.verdict}
    assert bool(one.cause) == (one.verdict != EXACT)
    assert bool(one.fails) == (one.verdict not in (EXACT, NOT_CHECKED))
    for moment in one.moments:
        assert moment.kind in truth.KINDS
        if one.fails and moment.then != NOT_CHECKED:
            assert (moment.then != EXACT) <= (moment.kind in one.fails), moment
    if one.moments:
        assert one.moments[0].then == one.verdict
    for name in one.files:
        last = re.sub(r"#.*", "", name.rpartition("/")[2])
        assert last in one.path.read_text(), f"{one.script} knows no {name}"
    for text, _ in one.cure:
        assert one.path.read_text().count(text) == 1, text


@pytest.mark.slow
@pytest.mark.parametrize("one", [one for one in TRUTHS if one.script != "endless"], ids=lambda one: one.script)
def test_two_undisturbed_runs_end_the_same_unless_the_truth_says_otherwise(
    one: Truth, whole: tuple[Path, int], tmp_path: Path
) -> None:
    undisturbed(one.path, tmp_path)
    assert (result(one, tmp_path) == result(one, whole[0])) == (one.cause != truth.NOT_REPRODUCIBLE)
    if one.options:
        assert (tmp_path / one.result).read_bytes() != (whole[0] / one.result).read_bytes()


@pytest.mark.parametrize(("one", "moment"), STRUCK)
def test_a_strike_shows_what_the_truth_says(
    one: Truth, moment: Moment, whole: tuple[Path, int], tmp_path: Path
) -> None:
    (untouched, steps), out = whole, tmp_path / "preempted"
    first, second = struck(one.path, out, moment)
    number = signal.Signals[moment.signal]
    if one.cause == truth.WORKERS and moment.then == STAYS_DOWN:
        assert first.code == 1, first.output
        assert second.code == 0, "by hand it goes on"
        assert result(one, out) == result(one, untouched)
        return
    assert first.code in (-number, 128 + number), first.output
    if moment.then == STAYS_DOWN:
        assert second.code == 1, second.output
        assert attempt(one.path, out).code == 1, "nor does it with another attempt"
        assert "Traceback" in second.output
        return
    assert second.code == 0, second.output
    same = result(one, out) == result(one, untouched)
    assert same == (moment.then != NOT_EXACT)
    started_over = second.steps == steps and one.cause != truth.MORE_STEPS
    if one.cause == truth.OLDER:
        assert not started_over
        assert (first.steps + second.steps > steps + 1) == (moment.then == LOST_WORK), "it does more than the rest"
    else:
        assert started_over == (moment.then in (LOST_WORK, NOT_CHECKED)), (steps, first.steps, second.steps)
    if moment.line == "time.sleep(" and moment.kind == truth.KILL and moment.then == NOT_EXACT:
        # It came right after a save: a right script does the rest, no more.
        assert (first.steps + second.steps > steps) == (one.cause == truth.MORE_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("one", [one for one in TRUTHS if one.cure], ids=lambda one: one.script)
def test_without_its_cause_the_first_strike_is_survived_exactly(one: Truth, tmp_path: Path) -> None:
    text = one.path.read_text()
    for was, becomes in one.cure:
        text = text.replace(was, becomes)
    script = tmp_path / one.path.name
    script.write_text(text)
    whole = undisturbed(script, tmp_path / "undisturbed")
    first, second = struck(script, tmp_path / "preempted", one.moments[0])
    assert first.code != 1, first.output
    assert second.code == 0, second.output
    assert second.steps < whole.steps
    assert result(one, tmp_path / "preempted") == result(one, tmp_path / "undisturbed")


def test_from_whichever_save_an_epoch_is_repeated_a_later_save_shows_it(tmp_path: Path, monkeypatch) -> None:
    """Or the cause that a rehearsal names would depend on the machine's speed."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def saves(out: Path) -> list[Path]:
        monkeypatch.setenv("OUT", str(out))
        runpy.run_path(str(BY_NAME["epoch_repeated"].path))
        return sorted((out / "checkpoints").iterdir())

    whole = saves(tmp_path / "whole")
    for count in range(1, len(whole)):
        folder = tmp_path / f"after-{count}" / "checkpoints"
        folder.mkdir(parents=True)
        for save in whole[:count]:
            shutil.copy(save, folder)
        assert saves(folder.parent)[-1].name > whole[-1].name, f"after {whole[count - 1].name}"


def test_the_endless_one_resumes_and_does_not_end(tmp_path: Path) -> None:
    one, out = BY_NAME["endless"], tmp_path / "out"
    long = Moment(truth.KILL, "time.sleep(", 2001, NOT_CHECKED)
    for number in (1, 2):
        taken = attempt(one.path, out, long)
        assert (taken.code, taken.steps) == (-signal.SIGKILL, 2000)
        assert json.loads((out / one.result).read_text())[0] == 2000 * number
    assert "while True:" in one.path.read_text()
    assert "break" not in one.path.read_text()


@pytest.mark.slow  # With their pauses, and from a cold start.
@pytest.mark.parametrize("one", [one for one in TRUTHS if one.script != "endless"], ids=lambda one: one.script)
def test_a_script_by_itself_ends_the_same(one: Truth, whole: tuple[Path, int], tmp_path: Path) -> None:
    env = clean_env(OUT=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, one.path], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if one.cause != truth.NOT_REPRODUCIBLE:
        assert result(one, tmp_path / "out") == result(one, whole[0])
