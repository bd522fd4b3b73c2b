"""The campaign of stops (make chaos): its plan, its judgement, its report, and the first 20 of its 200 stops."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import REPO

sys.path.append(str(REPO / "tests" / "chaos"))

import report
import stop_report
from stop_plan import AMID_STEPS, EPISODE, LAST_PHASE, MUST_FIT, PHASES, WHOLE, WORDS, plan
from stop_scene import Outcome, Scene, judge
from stops import episode, main
from tally import Tally

STOPS = plan(0, WHOLE)
FIRST = STOPS[: 2 * EPISODE]


def test_at_least_160_of_the_200_stops_fit_by_the_rule_that_the_plan_states() -> None:
    assert [stop.fits for stop in STOPS] == [stop.save_s < stop.notice_s for stop in STOPS]
    assert MUST_FIT <= sum(stop.fits for stop in STOPS) < WHOLE
    assert all(stop.save_s > stop.notice_s for stop in STOPS if not stop.fits)


def test_the_plan_has_every_phase_every_word_and_one_to_four_ranks() -> None:
    for stops in (STOPS, FIRST):
        assert {stop.phase for stop in stops} == set(PHASES)
        assert {stop.word for stop in stops} == set(WORDS)
        assert {stop.ranks for stop in stops} == {1, 2, 3, 4}
    assert {stop.phase for stop in STOPS if not stop.fits} == set(AMID_STEPS)
    assert all(stop.at_rank < stop.ranks for stop in STOPS)
    assert plan(0, 2 * EPISODE) == FIRST
    assert plan(1, WHOLE) != STOPS


STOP = next(stop for stop in STOPS if stop.phase == "an ordinary step" and stop.fits)
LATE = next(stop for stop in STOPS if not stop.fits)
RIGHT = Outcome(code=75, seconds=2.0, lost=0, first_step=5, before=4)


@pytest.mark.parametrize(
    ("stop", "changes", "problem"),
    [
        (STOP, {}, None),
        (STOP, {"lost": 1}, "1 steps were lost"),
        (LATE, {"lost": 1}, None),
        (STOP, {"code": 0}, "it ended with 0, not 75"),
        (LATE, {"code": 1}, "it ended with 1, not 75"),
        (replace(STOP, phase=LAST_PHASE), {"code": 0}, None),
        (replace(STOP, phase=LAST_PHASE), {}, "it ended with 75, not 0"),
        (LATE, {"seconds": 100.0}, "it was gone after 100.0 s"),
        (LATE, {"seconds": LATE.notice_s + 3 + 4 + 21}, "it was gone after 30.0 s"),
        (LATE, {"seconds": LATE.notice_s + 3 + 4}, None),
        (STOP, {"committed_s": STOP.notice_s + 1}, "it committed "),
        (STOP, {"committed_s": STOP.notice_s}, None),
        (STOP, {"seconds": None}, "it was never in its phase"),
        (STOP, {"stood_still": True}, "it did not end"),
        (LATE, {"left": ("process 7",)}, "processes are left: process 7"),
        (LATE, {"torn": ("0000000004-a0001-abcdef-1",)}, "not whole: 0000000004-a0001-abcdef-1"),
        (STOP, {"first_step": 1}, "its first step was 1, and step 4 had been saved"),
        (STOP, {"first_step": None}, None),
    ],
)
def test_a_stop_is_judged_by_what_it_leaves(stop: Any, changes: dict[str, Any], problem: str | None) -> None:
    found = judge(stop, replace(RIGHT, **changes))
    assert (found or "").startswith(problem or "")
    assert (found is None) == (problem is None)


def results(**changes: Any) -> dict[str, Any]:
    lines = [
        {**vars(stop), "fits": stop.fits, "lost": int(not stop.fits), "seconds": 3.0, "committed_s": 0.5, "wrong": None}
        for stop in STOPS
    ]
    return {"what": {"seed": 0}, "date": "2026-11-30", "seconds": 130.0, "lines": lines, **changes}


def test_the_results_stand_below_those_of_the_faults_and_neither_removes_the_other(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    faults = Tally(what={"seed": 0})
    report.write(path, faults)
    stop_report.write(path, results(seconds=1.0))
    report.write(path, faults)
    stop_report.write(path, results())
    text, fit = path.read_text(), sum(stop.fits for stop in STOPS)
    assert text.startswith(report.text(faults) + "\n## Stops\n")
    assert text.count("## Stops") == 1
    assert f"**200 stops in 2 min 10 s. {fit} fit their notice, as stated before the run; 0 steps were lost" in text
    assert f"In the {WHOLE - fit} others, a save takes longer than the notice: {WHOLE - fit} steps were lost." in text
    assert f"| {LAST_PHASE} | 20 | 20 | 0 | 0 |" in text


def test_only_a_whole_campaign_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    state = tmp_path / "state.json"
    for count, said in ((WHOLE, "results written"), (20, "not written")):
        known = results(lines=results()["lines"][:count], what={"seed": 0, "stops": count})
        state.write_text(json.dumps(known))
        command = ["stops.py", "--stops", str(count), "--state", str(state), "--report", str(tmp_path / "results.md")]
        monkeypatch.setattr(sys, "argv", command)
        assert main() == 0
        assert said in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, EPISODE])
def test_no_step_is_lost_in_ten_stops_of_one_run(tmp_path: Path, first: int) -> None:
    lines = episode(FIRST[first : first + EPISODE], tmp_path / "episode")
    assert [line["wrong"] for line in lines] == [None] * EPISODE
    assert sum(line["lost"] for line in lines if line["fits"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        ("nothing is saved", "steps were lost"),
        ("exit 0", "it ended with 0, not 75"),
        ("a process is left", "processes are left"),
    ],
)
def test_a_planted_mistake_is_found(tmp_path: Path, monkeypatch: Any, plant: str, problem: str) -> None:
    monkeypatch.setattr("stop_scene.LEFT_S", 1.0 if plant == "a process is left" else 60.0)
    stop = replace(STOP, ranks=1, at_rank=0, word="SIGTERM to the launcher")
    found = judge(stop, Scene(stop, tmp_path / "run", tmp_path / "control", plant).play())
    assert problem in (found or "nothing was found")
