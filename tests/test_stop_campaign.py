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
from stop_plants import PLANTS, changed
from stop_scene import Outcome, Scene, judge
from stops import ORDINARY, episode, main, planted
from tally import Tally

from trainer.training.participant import Participant

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


STOP = replace(ORDINARY, ranks=2)
CLOUDS = replace(STOP, word="AWS's notice")
LATE = next(stop for stop in STOPS if not stop.fits)
RIGHT = Outcome(code=75, seconds=2.0, lost=0, first_step=5, before=4, more_steps=2, stopped_at=(5, 5), held=True)


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
        (STOP, {"seconds": None}, "it was never in its phase; it ended with 75"),
        (STOP, {"seconds": None, "notice": "azure/Freeze-0"}, "it was never in its phase; it ended with 75, for azure"),
        (CLOUDS, {"refused": ("GET /: 401", "PUT /: 400")}, "the metadata service refused GET /: 401"),
        (CLOUDS, {"asked_in_training": True}, "the training thread asked the metadata service"),
        (CLOUDS, {"held": False}, "it did not hold until its machine was taken"),
        (STOP, {"held": False}, None),
        (replace(CLOUDS, word="AWS's notice, then SIGTERM"), {"held": False}, "it did not hold"),
        (replace(CLOUDS, word="AWS's notice, then SIGTERM", phase="import"), {"held": False}, None),
        (replace(CLOUDS, phase=LAST_PHASE), {"held": False, "code": 0}, None),
        (STOP, {"more_steps": 3}, "it did 3 more steps after it had heard of the stop"),
        (STOP, {"stopped_at": (4, 5)}, "the ranks stopped at different steps: rank 0 at 4, rank 1 at 5"),
        (STOP, {"stopped_at": (5, None)}, "the ranks stopped at different steps: rank 0 at 5, rank 1 at none"),
        (LATE, {"stopped_at": (5, None), "more_steps": 3}, None),
        (STOP, {"deadlines": (30.0, 36.0)}, "the ranks have different deadlines: 30 s and 36 s after the word"),
        (STOP, {"deadlines": (30.0, 34.0)}, None),
        (replace(STOP, word="AWS's notice, then SIGTERM"), {"deadlines": (120.0, 25.0)}, None),
        (LATE, {"mixed": ("step 4 holds the optimizer's step 5",)}, "the checkpoint of step 4 holds the optimizer's"),
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
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_mistake_is_found_and_named(tmp_path: Path, monkeypatch: Any, plant: str) -> None:
    if plant == "a process is left":
        monkeypatch.setattr("stop_scene.LEFT_S", 1.0)
    assert PLANTS[plant].seen in (planted(plant, tmp_path) or "nothing was found")


def test_a_mistake_that_changes_nothing_is_refused() -> None:
    with pytest.raises(AttributeError, match="Participant"):
        changed(Participant, "another_name", lambda *_: None)
    with pytest.raises(AssertionError, match="is no function: nothing would be planted"):
        changed(Participant, "__doc__", lambda *_: None)


@pytest.mark.slow
def test_a_stop_between_the_optimizers_step_and_its_count_loses_nothing(tmp_path: Path) -> None:
    """The mistake of saving in the signal handler is found here."""
    stop = replace(ORDINARY, phase="the optimizer's step")
    assert judge(stop, Scene(stop, tmp_path / "run", tmp_path / "control").play()) is None
