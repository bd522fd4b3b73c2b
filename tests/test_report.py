"""`skyspot report`: the figures of crafted records, each computed by hand; torn and hostile records; a real run."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import catalogs
import click
import pytest
from click.testing import CliRunner
from crafted import LAUNCH, NOON, PLACE, CraftedAttempt, three_attempts
from odd_records import odd_records
from raw_records import by_hand
from support import REPO, event, mlp
from support_sky import run_commands

from skyspot.cli import report_tables
from skyspot.cli.rehearse import rehearse
from skyspot.cli.report import report as command
from skyspot.errors import SkyspotError, UsageError
from skyspot.money import sentences
from skyspot.money.attempts import NO_WORD, RUNNING, SILENT, lives
from skyspot.money.matching import Match, match_rungs, stated
from skyspot.money.prices import OFFERED, Place, Price, RungPrice
from skyspot.money.pricing import price_ladder, read_market
from skyspot.money.report import Given, Report, report_of, to_json
from skyspot.money.spend import read_prices
from skyspot.money.timeline import timeline_of
from skyspot.money.travel import travelling
from skyspot.money.waiting import (
    CLOCKS,
    SKYPILOT,
    StatusChange,
    job_of_launch,
    status_change,
    waits_by_skypilot,
)
from skyspot.page.page import _tiles, page
from skyspot.page.words import of_steps
from skyspot.runs import find
from skyspot.runs.records import read_records
from skyspot.task import document
from trainer.attempt.price import price_of, read_ladder
from trainer.layout.names import RunPaths

LATER = NOON + 1e6


def reported(root: Path, now: float = LATER, **given: object) -> Report:
    return report_of(read_records(RunPaths(root)), Given(**{"now": now, "prices": {}, "waits": {}, **given}))  # type: ignore[arg-type]


def near(value: float | None) -> object:
    return pytest.approx(value, abs=1e-6)


def times(report: Report, attempt: int) -> dict[str, float]:
    return {name: seconds for name, seconds in asdict(report.attempts[attempt].times).items() if seconds > 1e-6}


def shown(root: object, *args: str) -> str:
    done = CliRunner().invoke(command, [str(root), *args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def words(text: str) -> str:
    """Without line breaks, whose places depend on the terminal."""
    return " ".join(text.split())


# -- the figures -------------------------------------------------------------------------------------------------------


def test_each_second_of_an_attempt_is_where_it_was_spent(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    found = reported(tmp_path)
    assert times(found, 0) == {
        "setup": near(60 + 10 + 10 - 0.5), "restore": near(0.5), "productive": near(20 - 1.0 - 0.5), "data": near(1.0),
        "saving": near(0.5 + 1.0 + 2.0), "evaluation": near(3.0), "other": near(0.2 + 0.3),
    }  # fmt: skip
    # Steps 16 and 17 have lines, step 18 is known from the progress alone: 2 s each, of which 1.5 s were recorded.
    assert times(found, 1) == {
        "setup": near(100 + 6 - 1), "restore": near(1.0), "productive": near(10.0), "lost": near(6.0),
        "other": near(0.5), "waiting": near(200.0),
    }  # fmt: skip
    assert times(found, 2) == {
        "setup": near(100 + 5 - 0.5), "restore": near(0.5), "productive": near(10.0), "saving": near(1.0),
        "other": near(1.0), "waiting": near(200.0),
    }  # fmt: skip
    total = 106.5 + (100 + 22.5) + (100 + 17) + 400
    assert found.times.total == near(total)
    assert found.goodput == near((18.5 + 10 + 10) / total)
    assert [one.seconds for one in found.attempts] == [near(106.5), near(122.5), near(117.0)]


def test_lost_steps_are_those_that_were_done_again_and_at_least_so_many_after_a_kill(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    found = reported(tmp_path)
    assert [(one.steps, one.lost_steps, one.is_lost_at_least) for one in found.attempts] == [
        (10, 0, False), (8, 3, True), (5, 0, False),
    ]  # fmt: skip
    assert (found.lost_steps, found.is_lost_at_least) == (3, True)
    assert (found.state, found.last_step, found.max_steps, found.preemptions) == ("finished", 20, 20, 2)
    assert [one.ended for one in found.attempts] == ["notice", NO_WORD, "finished"]
    assert [one.is_preemption for one in found.attempts] == [True, True, False]
    assert found.attempts[0].committed_s == 2.1


def test_a_checkpoint_that_was_damaged_later_loses_the_steps_of_two_attempts(tmp_path: Path) -> None:
    for number, restored, last in ((1, 0, 20), (2, 20, 25), (3, 10, 30)):
        one = CraftedAttempt(tmp_path, number, NOON + 1000 * number)
        one.start()
        one.restored(restored, 1)
        ended = one.steps(restored + 1, last, 4)
        one.saved(last // 10 * 10, ended)
        one.end(ended + 1, "hang" if number < 3 else "error", 75, step=last, committed_step=last // 10 * 10)
    found = reported(tmp_path)
    assert [one.lost_steps for one in found.attempts] == [10, 5, 0]
    assert [one.times.lost for one in found.attempts] == [near(20.0), near(10.0), 0.0]
    assert found.preemptions == 0, "each ended by itself"
    assert (found.is_lost_at_least, found.state) == (False, "ended")


def test_steps_after_the_last_commit_are_lost_once_an_attempt_has_ended_and_not_while_it_runs(tmp_path: Path) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start()
    one.restored(0, 1)
    one.steps(1, 7, 4)
    one.saved(5, 14)
    one.progress(7, 17, max_steps=20)
    running = reported(tmp_path, now=NOON + 20)
    assert (running.state, running.attempts[0].lost_steps, running.is_lost_at_least) == (RUNNING, 0, False)
    assert running.times.productive == near(14.0)
    silent = reported(tmp_path, now=NOON + 2000)
    assert (silent.state, silent.attempts[0].lost_steps, silent.is_lost_at_least) == (SILENT, 2, True)
    assert (silent.times.productive, silent.times.lost) == (near(10.0), near(4.0))
    one.end(18, "error", 1, step=8, committed_step=5)
    ended = reported(tmp_path)
    assert (ended.attempts[0].lost_steps, ended.is_lost_at_least, ended.last_step) == (3, False, 5)


def test_an_end_that_the_launcher_wrote_for_a_killed_rank_does_not_tell_its_last_step(tmp_path: Path) -> None:
    for number in (1, 2):
        one = CraftedAttempt(tmp_path, number, NOON + 100 * number)
        one.start()
        one.restored(0, 1)
        one.steps(1, 4, 4)
        one.end(20, "died" if number == 1 else "error", 75, step=None if number == 1 else 4)
    found = reported(tmp_path)
    assert [(one.lost_steps, one.is_lost_at_least) for one in found.attempts] == [(4, True), (4, False)]
    assert found.preemptions == 0


def test_a_wait_of_the_script_itself_counts_where_it_logs_it(tmp_path: Path) -> None:
    """A loop of one's own evaluates between two steps; `run.log(eval_s=...)` tells how long."""
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start()
    one.restored(0, 1)
    one.step(1, 4)
    one.step(2, 9, step_s=5.0, eval_s=3.0, data_s=0.5)
    assert {"productive": near(3.5), "evaluation": near(3.0), "data": near(0.5)}.items() <= times(
        reported(tmp_path, now=NOON + 10), 0
    ).items()


def test_an_evaluation_at_a_boundary_that_is_saved_is_no_saving(tmp_path: Path) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start()
    one.restored(0, 1)
    one.step(1, 4)
    one.saved(1, 9)
    one.line({"step": 1, "eval_loss": 1.0, "eval_s": 3.0, "monotonic": 1008.0})
    one.step(2, 10)  # Four seconds after the first one: three of the evaluation, one of the save.
    one.progress(2, 15)
    assert {"evaluation": near(3.0), "saving": near(1.0), "productive": near(4.0)}.items() <= times(
        reported(tmp_path, now=NOON + 16), 0
    ).items()


def test_odd_waits_never_exceed_their_step(tmp_path: Path) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start()
    one.restored(0, 1)
    one.step(1, 4, data_s=1e6, save_s=1e6, eval_s=1e6)
    one.end(6, "error", 1, step=1)
    found = reported(tmp_path).attempts[0]
    assert found.times.total == near(6.0)


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_clocks_of_two_machines_that_disagree_give_no_negative_wait_and_a_note(tmp_path: Path) -> None:
    attempts = three_attempts(tmp_path)
    for path in attempts[1].folder.glob("*.json"):  # This machine's clock is an hour behind.
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, "time": fields["time"] - 3600}))
    found = reported(tmp_path)
    assert found.attempts[1].times.waiting == 0.0
    assert found.attempts[1].seconds == near(122.5), "its own times are as they were"
    note = "a0002-000002 began 3400 s before a0001-000001 ended, by their machines' clocks: these disagree"
    assert any(one.startswith(note) for one in found.notes)
    assert found.attempts[2].times.waiting == near(3800.0), "a clock that is behind cannot be told from a long wait"


def test_a_clock_that_is_set_while_an_attempt_lives_changes_nothing(tmp_path: Path) -> None:
    attempts = three_attempts(tmp_path)
    before = times(reported(tmp_path), 0)
    for path in sorted(attempts[0].folder.glob("*.json"))[2:]:
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, "time": fields["time"] + 5000}))
    assert times(reported(tmp_path), 0) == before


def test_records_of_a_release_without_the_monotonic_clock_are_read_by_the_time_of_day(tmp_path: Path) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON, has_monotonic=False)
    one.start(setup_s=60)
    one.restored(0, 5)
    one.step(1, 12)
    one.event("first-step", 12, step=1, seconds=15.0)
    one.steps(2, 5, 14)
    one.saved(5, 22, stall_s=1.5)
    one.end(23, "finished", 0, step=5)
    found = reported(tmp_path).attempts[0]
    assert found.seconds == near(60 + 3 + 23)
    assert times(reported(tmp_path), 0) == {
        "setup": near(60 + 3 + 10 - 0.5), "restore": near(0.5), "productive": near(10.0), "saving": near(1.5),
        "other": near(1.5),
    }  # fmt: skip


def test_a_set_up_counts_for_the_first_attempt_after_it(tmp_path: Path) -> None:
    """The machine keeps its seconds; a second attempt there, or one days later, has no set-up of its own."""
    for number, since in ((1, 10.0), (2, 110.0)):
        one = CraftedAttempt(tmp_path, number, NOON + 100 * (number - 1))
        one.start(machine="the-same", setup_s=60, since_setup_s=since, launched_s=2.0)
        one.end(50, "hang", 75)
    CraftedAttempt(tmp_path, 3, NOON).start(setup_s=60, since_setup_s=86400.0, launched_s=2.0)
    assert [life.lead_s for life in lives(read_records(RunPaths(tmp_path)).attempts)] == [70.0, 2.0, 2.0]


# -- SkyPilot's record -------------------------------------------------------------------------------------------------


def change(at: float, status: str, reason: str = "", code: str = "", source: str = "") -> StatusChange:
    return StatusChange(at, status, reason, code, source)


PREEMPTED = "Cluster preempted or failed, recovering"


def test_waits_and_their_reasons_come_from_skypilots_record_by_its_own_clock(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    own = lives(read_records(RunPaths(tmp_path)).attempts)
    record = [
        change(0, "PENDING"), change(5, "STARTING"), change(65, "RUNNING"),
        change(200, "RECOVERING", PREEMPTED), change(470, "RUNNING"),
        change(600, "RECOVERING", "no capacity"), change(620, "RECOVERING", PREEMPTED), change(700, "RUNNING"),
        change(900, "SUCCEEDED"),
    ]  # fmt: skip
    waits, asked_for, note = waits_by_skypilot(own, record)
    assert [(one.seconds, one.source, one.why) for one in waits.values()] == [
        (65, SKYPILOT, ""), (270, SKYPILOT, PREEMPTED), (100, SKYPILOT, "no capacity"),
    ]  # fmt: skip
    assert (asked_for, note) == (set(), "")
    found = reported(tmp_path, waits=waits)
    assert [one.times.waiting for one in found.attempts] == [65, 270, 100]
    total = 106.5 + 122.5 + 117 + 435
    assert found.goodput == near(38.5 / total)


def test_a_record_that_does_not_fit_the_attempts_is_not_used(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    own = lives(read_records(RunPaths(tmp_path)).attempts)
    waits, _, note = waits_by_skypilot(own, [change(0, "STARTING"), change(5, "RUNNING")])
    assert not waits
    assert "has 1 starts, and there are 3 attempts" in note


@pytest.mark.parametrize(
    ("recovery", "preemptions"),
    [
        (change(200, "RECOVERING", PREEMPTED), 2),
        (change(200, "RECOVERING", PREEMPTED, source="FAILURE"), 2),
        (change(200, "RECOVERING", PREEMPTED, source="RESTART"), 1),
        (change(200, "RECOVERING", "controller error", source="EMERGENCY"), 1),
        (change(200, "RECOVERING", "Recovery requested by user alice (request ID: 1)"), 1),
        (change(200, "RECOVERING", "exit code 137", code="USER_JOB_FAILURE"), 1),
    ],
)
def test_a_recovery_that_a_person_or_skypilot_asked_for_is_no_preemption(
    tmp_path: Path, recovery: StatusChange, preemptions: int
) -> None:
    three_attempts(tmp_path)
    own = lives(read_records(RunPaths(tmp_path)).attempts)
    record = [
        change(0, "STARTING"), change(9, "RUNNING"),
        change(100, "RECOVERING", "exit code 75", code="USER_JOB_FAILURE"),  # It left with 75 at its notice.
        change(150, "RUNNING"), recovery, change(250, "RUNNING"),
    ]  # fmt: skip
    waits, asked_for, _ = waits_by_skypilot(own, record)
    assert reported(tmp_path, waits=waits, asked_for=frozenset(asked_for)).preemptions == preemptions


def test_a_run_that_a_person_launched_again_was_not_preempted(tmp_path: Path) -> None:
    for number, launch in ((1, "one"), (2, "two")):
        one = CraftedAttempt(tmp_path, number, NOON + 100 * number)
        one.start(launch=launch)
        one.restored(0, 1)
        one.end(9, "signal", 75, notice={"kind": "sigterm"})
    assert reported(tmp_path).preemptions == 0


def test_a_job_is_known_by_the_launchs_id_and_a_rehearsals_is_none() -> None:
    found = job_of_launch("sky-managed-2026-11-30-08-00-00-000000_run-001_7-0")
    assert found
    assert (found.job_id, found.task) == (7, 0)
    for other in (LAUNCH, "sky-managed-rehearsal-preempted-a1b2c3_run-001_1-0", "", "x\n_1-0"):
        assert job_of_launch(other) is None


@pytest.mark.slow
def test_a_server_of_skypilots_that_does_not_answer_is_a_note(tmp_path: Path) -> None:
    run = tmp_path / "run"
    one = CraftedAttempt(run, 1, NOON)
    one.start(launch="sky-managed-2026-11-30-08-00-00-000000_run-001_7-0")
    one.end(9, "finished", 0)
    ((code, output),) = run_commands([["report", str(run)]], tmp_path / "home", tmp_path)
    assert code == 0, output
    assert "Note: Waiting is taken from the machines' clocks: SkyPilot's API server does not answer. Start it" in output


def test_a_row_of_skypilots_record_is_read_as_it_comes() -> None:
    row = {"timestamp": "2026-11-30T08:00:01.5", "new_status": "RECOVERING", "reason": "a\n b", "code": None}
    one = status_change(row)
    other = status_change({**row, "timestamp": "2026-11-30T08:00:03"})
    assert one
    assert other
    assert (one.status, one.reason, one.code, one.source) == ("RECOVERING", "a b", "", "")
    assert other.at - one.at == 1.5
    assert status_change({"new_status": "RUNNING"}) is None


# -- money -------------------------------------------------------------------------------------------------------------


def test_spend_is_node_time_at_the_price_of_its_place_and_on_demand_is_the_preserved_steps(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    prices = {"a0001-000001": Price(1.0, 4.0, "--prices"), "a0002-000002": Price(2.0, 5.0, "--prices"),
              "a0003-000003": Price(1.0, 4.0, "--prices")}  # fmt: skip
    spend = reported(tmp_path, prices=prices).spend
    # The second attempt has two nodes, and no end: its last record and a minute.
    usd = (106.5 * 1.0 + (122.5 + 60) * 2 * 2.0 + 117.0 * 1.0) / 3600
    on_demand = ((79.5 + 18.5 + 1.0 + 3.0) * 4.0 + 10.0 * 2 * 5.0 + 10.0 * 4.0) / 3600
    assert spend.usd == near(usd)
    assert spend.on_demand_usd == near(on_demand)
    assert spend.saving == near(1 - usd / on_demand)
    assert spend.node_hours == near((106.5 + (122.5 + 60) * 2 + 117.0) / 3600)


def test_a_recorded_price_counts_before_a_stated_one_and_a_missing_one_is_said(tmp_path: Path) -> None:
    for number, place in ((1, {**PLACE, "usd_per_hour": 36.0, "on_demand_usd_per_hour": 72.0, "rung": 2}), (2, PLACE)):
        one = CraftedAttempt(tmp_path, number, NOON + 100 * number)
        one.start(place=place)
        one.restored(0, 1)
        one.end(10, "hang", 75)
    spend = reported(tmp_path, prices={"a0001-000001": Price(1.0, 2.0, "--prices")}).spend
    assert (spend.usd, spend.unpriced_attempts, spend.saving) == (near(0.1), 1, None)
    assert spend.sources == ("recorded",)
    text = shown(tmp_path)
    assert text.splitlines()[1].split()[:3] == ["where", "rung", "from"]
    text = words(text)
    assert "USD 0.10 for 0.00556 node-hours (prices: recorded); without 1 attempt with 0.00278 node-hours" in text
    without = "no price is known; 0.00556 node-hours. --prices SPOT,ONDEMAND states one"
    for path in tmp_path.glob("attempts/a0001*/0001-start.json"):
        path.write_text(path.read_text().replace("usd_per_hour", "x"))
    assert without in words(shown(tmp_path))


def test_the_saving_is_a_line_that_can_be_quoted(tmp_path: Path) -> None:
    three_attempts(tmp_path)
    hours, needed = (106.5 + 182.5 * 2 + 117) / 3600, (102 + 20 + 10) / 3600
    more, instead = hours * 9.83 / (needed * 32.77) - 1, f"USD {hours * 9.83:.2f} instead of USD {needed * 32.77:.2f}"
    line = f"This run cost {more:.0%} more than on-demand would have: {instead}."
    assert line in shown(tmp_path, "--prices", "9.83,32.77"), "so short a run costs more"
    line = f"This run saved 81% against on-demand: USD {hours:.2f} instead of USD {needed * 24:.2f}."
    assert line in shown(tmp_path, "--prices", "1,24")


LADDER = """
num_nodes: 1
resources:
  ordered:
    - {accelerators: "A100:8", use_spot: true, infra: aws}
    - {accelerators: "A100-80GB:8", use_spot: true, infra: aws}
    - {accelerators: "A10G:8", use_spot: true}
    - {accelerators: "A100:8", use_spot: false, infra: aws}
envs: {SKYSPOT_CHECKPOINT_DIR: %s}
"""


def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spot: dict[tuple[str, str, str], float]) -> Path:
    """A project whose run-001 has LADDER, and a catalog with spot prices by (accelerator, region, zone of AWS).

    Returns the run's folder.
    """
    root, project = tmp_path / "runs" / "run-001", tmp_path / "project"
    (project / ".skyspot").mkdir(parents=True)
    (project / ".skyspot" / "run-001.yaml").write_text(LADDER % root)
    rows = [
        {"type": f"x.{gpu}", "gpu": gpu, "count": 8, "cpus": 96, "memory": 1152, "price": 4 * usd, "spot": usd,
         "region": region, "zone": zone}
        for (gpu, region, zone), usd in spot.items()
    ]  # fmt: skip
    catalogs.write(tmp_path / "sky", "aws", rows)
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path / "sky"))
    monkeypatch.chdir(project)
    return root


def attempts_at(root: Path, places: Sequence[Mapping[str, object]]) -> None:
    """Make an attempt of an hour at each of the places; what a place does not say is as in PLACE."""
    for number, place in enumerate(places, 1):
        one = CraftedAttempt(root, number, NOON + 10_000 * number)
        one.start(place={**PLACE, **place})
        one.end(3600, "hang", 75)


def test_the_rung_and_its_price_are_found_in_the_ladder_of_the_launched_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spot price of the attempt's own zone, in SkyPilot's catalog."""
    prices = {("A100", "us-east-1", "us-east-1a"): 9.0, ("A100", "us-east-1", "us-east-1b"): 8.0,
              ("A100-80GB", "us-east-1", "us-east-1a"): 12.0, ("A10G", "us-west-2", "us-west-2a"): 3.0}  # fmt: skip
    root = launched(tmp_path, monkeypatch, prices)
    places = [
        {"zone": "us-east-1a", "accelerator": "NVIDIA A100-SXM4-40GB", "accelerators_per_node": 8},
        {"zone": "us-east-1b", "accelerator": "NVIDIA A100-SXM4-40GB", "accelerators_per_node": 8},
        {"zone": "us-east-1a", "accelerator": "NVIDIA A100-SXM4-80GB", "accelerators_per_node": 8},
        {"zone": "us-west-2a", "region": "us-west-2", "accelerator": "NVIDIA A10G", "accelerators_per_node": 8},
        {"zone": "us-west-2a", "region": "us-west-2", "accelerator": "NVIDIA A10G", "accelerators_per_node": 4},
    ]
    attempts_at(root, places)
    found = json.loads(shown("run-001", "--json"))["attempts"]
    assert [one["place"]["rung"] for one in found] == [1, 1, 2, 3, None]
    assert [one["place"]["use_spot"] for one in found] == [True, True, True, True, None]
    assert [one["priced"]["usd"] for one in found] == [near(9.0), near(8.0), near(12.0), near(3.0), None]
    assert found[0]["priced"]["price"] == {"usd_per_hour": 9.0, "on_demand_usd_per_hour": 36.0, "source": "catalog"}
    found = json.loads(shown("run-001", "--json", "--prices", "1,2"))["attempts"]
    assert [one["priced"]["usd"] for one in found] == [near(1.0)] * 5


def test_where_the_catalog_has_zone_ids_the_dearest_spot_price_of_the_region_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the prices that `launch` sends along. An attempt knows us-east-1a; which id that is, only AWS knows."""
    prices = {("A100", "us-east-1", "use1-az1"): 9.0, ("A100", "us-east-1", "use1-az2"): 8.0,
              ("A100", "us-west-2", "usw2-az1"): 20.0, ("A10G", "us-west-2", "usw2-az1"): 3.0}  # fmt: skip
    root = launched(tmp_path, monkeypatch, prices)
    a100 = {"accelerator": "NVIDIA A100-SXM4-40GB", "accelerators_per_node": 8}
    places = [a100, {**a100, "region": "us-west-2", "zone": "us-west-2c"}, {**a100, "region": "eu-west-1"}]
    attempts_at(root, places)
    found = json.loads(shown("run-001", "--json"))["attempts"]
    assert [one["place"]["rung"] for one in found] == [1, 1, None]
    assert [one["priced"]["usd"] for one in found] == [near(9.0), near(20.0), None]
    source = "catalog, the dearest zone of the region"
    assert found[0]["priced"]["price"] == {"usd_per_hour": 9.0, "on_demand_usd_per_hour": 36.0, "source": source}
    assert f"(prices: {source})" in words(shown("run-001"))
    [task] = document.tasks((tmp_path / "project" / ".skyspot" / "run-001.yaml").read_text())
    ladder = read_ladder(travelling(price_ladder(task, read_market([task], ()))))
    sent = [price_of({**PLACE, **place}, ladder, lambda: True) for place in places[:2]]
    assert [(one["rung"], one["usd_per_hour"]) for one in sent] == [(1, 9.0), (1, 20.0)], "what the trainer is sent"


@pytest.mark.parametrize(
    ("driver", "rung"),
    [
        ("NVIDIA L40S", 3), ("NVIDIA L4", 1), ("NVIDIA L40", None), ("NVIDIA A100-SXM4-40GB", 4), ("NVIDIA A10", 2),
        ("NVIDIA A10G", None), ("NVIDIA A100-SXM4-80GB", 5), ("NVIDIA GeForce RTX 4090", 6), ("", 1),
    ],
)  # fmt: skip
def test_a_rung_matches_by_whole_words_of_the_drivers_name(tmp_path: Path, driver: str, rung: int | None) -> None:
    names = ("L4:8", "A10:8", "L40S:8", "A100:8", "A100-80GB:8", "RTX4090:8")
    offer = Place("aws", "us-east-1", "us-east-1a", "", 1.0, 2.0)
    rungs = [RungPrice(n, name, "", True, 1, (offer,), 2.0, None, OFFERED) for n, name in enumerate(names, 1)]
    place = {"cloud": "aws", "region": "us-east-1", "zone": "us-east-1a", "accelerator": driver,
             "accelerators_per_node": 8}  # fmt: skip
    CraftedAttempt(tmp_path, 1, NOON).start(place=place)
    [found] = [*match_rungs(lives(read_records(RunPaths(tmp_path)).attempts), rungs).values()] or [None]
    assert (found and found.rung) == rung


def test_an_attempt_on_an_on_demand_rung_costs_the_on_demand_price() -> None:
    price = Price(1.0, 4.0, "--prices")
    assert stated(Match(4, False, None), price).usd_per_hour == 4.0
    assert stated(Match(1, True, None), price).usd_per_hour == stated(None, price).usd_per_hour == 1.0


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "0,1", "-1,2", "nan,1", "inf,1", ""])
def test_prices_that_are_none_are_refused_in_a_line(text: str) -> None:
    with pytest.raises(UsageError, match="is not SPOT,ONDEMAND in USD an hour and node, like"):
        read_prices(text)


@pytest.mark.parametrize("program", [command, rehearse])
@pytest.mark.parametrize(
    ("prices", "said"),
    [("32.77,9.83", "SPOT 32.77 is above ONDEMAND 9.83. The order is SPOT,ONDEMAND here"), ("", "'' is not SPOT,ON")],
)  # fmt: skip
def test_prices_in_the_order_of_a_plan_are_refused_before_anything_is_read(
    tmp_path: Path, program: click.Command, prices: str, said: str
) -> None:
    task = "task.yaml" if program is rehearse else str(tmp_path)
    done = CliRunner().invoke(program, [task, "--prices", prices])
    assert isinstance(done.exception, UsageError)
    assert f"--prices: {said}" in str(done.exception)


def test_large_figures_have_separators_and_no_exponent(tmp_path: Path) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start(place={**PLACE, "nodes": 16})
    one.restored(0, 5)
    ended = one.steps(1, 100, 10, step_s=3600.0)
    one.saved(100, ended + 1)
    one.end(ended + 2, "finished", 0, step=100)
    text = shown(tmp_path, "--prices", "10,30")
    assert "USD 15,840.53 for 1,584 node-hours (prices: --prices)" in words(text)
    assert "On demand USD 47,521.60 for 1,584 node-hours" in words(text)
    records = read_records(RunPaths(tmp_path))
    for prices, cost in (({}, "1,584"), ({"a0001-000001": Price(10, 30, "x")}, "15,840.53")):
        document = page(report_of(records, Given(LATER, prices, {})), records, LATER)
        assert cost in document
        assert not re.search(r"[0-9]e\+0[0-9]", document)


@pytest.mark.parametrize(("restored", "done_again"), [(10, 0), (9, 1)])
def test_after_a_kill_no_recorded_lost_step_is_not_none_lost(tmp_path: Path, restored: int, done_again: int) -> None:
    first, second = CraftedAttempt(tmp_path, 1, NOON), CraftedAttempt(tmp_path, 2, NOON + 200)
    first.start()
    first.restored(0, 5)
    first.saved(restored, first.steps(1, 10, 10) + 1)
    second.start()
    second.restored(restored, 5)
    second.end(second.steps(restored + 1, 12, 10) + 1, "finished", 0, step=12, committed_step=12)
    found = reported(tmp_path)
    lines = dict(sentences.summary(found))
    assert lines["Lost steps"] == ("at least 1 of 13 done" if done_again else "not known (12 done)")
    told = "At least 1 of 13 steps was done and lost" if done_again else "No lost step is recorded."
    assert of_steps(found).text.startswith(told)
    tile = next(tile for tile in _tiles(found) if tile[0] == "Lost steps")
    assert tile[1] == ("≥ 1" if done_again else "not known")


def test_the_interval_is_compared_with_the_best_in_hindsight(tmp_path: Path) -> None:
    def run(root: Path, ends: list[str]) -> Report:
        for number, cause in enumerate(ends, 1):
            one = CraftedAttempt(root, number, NOON + 10_000 * number)
            one.start()
            one.restored(0, 1)
            one.steps(1, 12, 4)
            for step in (4, 8, 12):
                one.saved(step, 4 + 2 * step, stall_s=0.09, commit_s=1.0)
            one.end(1000, cause, 75, step=12, committed_step=12)
        return reported(root)

    few = run(tmp_path / "few", ["notice", "error"]).interval
    assert (few.best_steps, few.why_unknown, few.chosen_steps) == (None, "too few preemptions to tell", 4)
    assert "every 4 steps (8.0 s); the best in hindsight: too few preemptions to tell" in words(shown(tmp_path / "few"))
    found = run(tmp_path / "enough", ["notice", "notice", "error"]).interval
    assert found.between_s == near(1500.0)
    best_s = math.sqrt(2 * 0.09 * 1500)
    assert found.best_steps == round(best_s / 2)
    assert found.chosen_loss == near(0.09 / 8 + 8 / 2 / 1500)
    assert found.best_loss == near(0.09 / 16 + 16 / 2 / 1500)


# -- what is missing, torn, or hostile ---------------------------------------------------------------------------------


def test_torn_and_missing_records_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    attempts = three_attempts(tmp_path)
    start = next(attempts[0].folder.glob("*-start.json"))
    start.write_bytes(start.read_bytes()[:40])
    next(attempts[2].folder.glob("*-end.json")).write_bytes(b"")
    (attempts[2].folder / "0002-restored.json").unlink()
    with attempts[1].metrics.open("ab") as file:
        file.write(b'{"step": 18, "lo')
    found = reported(tmp_path)
    assert found.lost_steps == 3, "the third attempt's first step tells where it resumed"
    assert found.goodput
    for note in (
        "a0001-000001: 0001-start.json is torn.",
        "a0001-000001: it has no start event.",
        "a0002-000002: metrics-0000000011.jsonl is torn after the line of step 17.",
        "a0002-000002: no end is recorded; its last record counts as its end.",
        "a0003-000003: 0004-end.json is torn.",
        "a0003-000003: events 2 are missing.",
    ):
        assert note in found.notes, found.notes


def test_a_script_without_steps_gets_its_attempts_and_is_told_so(tmp_path: Path) -> None:
    """As the launcher's sidecar records them."""
    for number in (1, 2):
        one = CraftedAttempt(tmp_path, number, NOON + 100 * number)
        one.start()
        one.end(50, "signal" if number == 1 else "finished", 75 if number == 1 else 0)
    found = reported(tmp_path)
    assert (found.goodput, found.has_steps, found.lost_steps, found.preemptions) == (None, False, 0, 1)
    text = shown(tmp_path, "--prices", "36,72")
    assert "No attempt recorded a step" in text
    assert "Goodput" not in text.replace("Goodput and lost", "")
    assert "USD 1.00" in text


def test_what_a_run_names_cannot_touch_the_terminal(tmp_path: Path) -> None:
    """Control characters, colours, markup, other directions of writing: a run's records are not trusted."""
    hostile = "\x1b]0;owned\x07\x1b[31m[bold]\r\n\u202e\x00\x9b2J"
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start(launch=hostile, place={"cloud": hostile, "region": hostile, "accelerator": hostile, "rung": 1})
    one.restored(0, 1)
    one.step(1, 4, **{hostile: 1})
    one.event("notice", 4, kind=hostile)
    one.end(6, hostile, 75, step=1, notice={"kind": hostile})
    (one.folder / f"0009-x{hostile[:3]}.json").write_text("{")
    for args in ((), ("--json",)):
        text = shown(tmp_path, *args)
        assert not [c for c in text if not (c.isprintable() or c == "\n")]
    assert "\\x1b[31m[bold]" in shown(tmp_path)


ODD = [
    None, True, "x", "", -1, 0, 10**400, 1e308, -1e308, math.nan, -math.inf, [], [[]], {}, {"a": 1}, "\ud800", 1.5,
    "9" * 5000,
]  # fmt: skip


def test_no_value_of_any_record_makes_the_report_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, records in enumerate(odd_records(tmp_path, 5, ODD, 300)):
        found = report_of(records, Given(LATER, {}, {}))
        json.dumps(to_json(found), allow_nan=False)
        for one in found.attempts:
            assert all(0 <= seconds <= 1e12 for seconds in asdict(one.times).values())
            assert one.times.total - one.times.waiting == pytest.approx(one.seconds, rel=1e-6, abs=1e-3)
        if number % 50 == 0:
            report_tables.show(found, timeline_of(records, found))
            assert "attempts" in capsys.readouterr().out


def test_nan_in_a_record_costs_no_other_record(tmp_path: Path) -> None:
    """The trainer writes null, but the json of Python, which another program may have used, writes NaN."""
    first, second, _ = three_attempts(tmp_path)
    before = reported(tmp_path)
    lines = [{**line, **({"loss": math.nan} if line["step"] == 3 else {})} for line in first.lines]
    first.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (*first.folder.glob("*-start.json"), *first.folder.glob("*-end.json"), second.folder / "progress.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "loss": math.inf}))
    assert reported(tmp_path) == before
    losses = [line.loss for line in read_records(RunPaths(tmp_path)).attempts[0].lines if line.is_step]
    assert losses == [1.0, 1.0, None, *[1.0] * 7]


def test_a_folder_without_an_attempt_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    with pytest.raises(SkyspotError, match="no attempt has begun"):
        CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)


def test_a_run_in_a_bucket_is_reported_by_its_url(tmp_path: Path) -> None:
    import fsspec

    three_attempts(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/bucket/run-001", recursive=True)
    try:
        url = "memory://bucket/run-001"
        from_url = report_of(read_records(find.open_existing(url)), Given(LATER, {}, {}))
        assert replace(from_url, root="") == replace(reported(tmp_path), root="")
    finally:
        memory.rm("/bucket", recursive=True)


def test_the_report_as_a_terminal_shows_it(tmp_path: Path) -> None:
    """As docs/report.md has it."""
    three_attempts(tmp_path)
    printed = shown(tmp_path, "--prices", "4.10,32.77").replace(str(tmp_path), "runs/run-001")
    example = (REPO / "docs" / "report.md").read_text().partition("```text\n")[2].partition("```")[0]
    assert printed == example
    assert [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()[1:5]] == [
        ["where", "from", "to", "ended", "notice to commit", "steps", "lost", "set-up", "restore"],
        ["1", "aws/us-east-1a", "01-15 07:58:50", "01-15 08:00:36", "aws-notice (75)", "2.1 s", "1-10", "0",
         "1 min 20 s", "0.5 s"],
        ["2", "gcp/us-central1 x2", "01-15 08:03:56", "01-15 08:05:59", "no word", "-", "11-18", ">=3", "1 min 45 s",
         "1.0 s"],
        ["3", "aws/us-east-1a", "01-15 08:09:19", "01-15 08:11:16", "finished", "-", "16-20", "0", "1 min 44 s",
         "0.5 s"],
    ]  # fmt: skip


# -- a real run --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_of_a_real_run_is_what_its_raw_files_say(run_dir: Path) -> None:
    """Killed at step 10, stopped by a signal, finished: goodput, lost steps and spend, by other code."""
    assert mlp(run_dir, "--fault", "sigterm@9", grace=120).code == 75
    assert mlp(run_dir).code == 0
    by_hand(run_dir, spot=9.83, on_demand=32.77).compare(shown(run_dir, "--json", "--prices", "9.83,32.77"))
    found = reported(run_dir, now=time.time())
    assert [one.ended for one in found.attempts] == [NO_WORD, "signal", "finished"]
    assert found.attempts[1].committed_s == event(run_dir, "end", 1)["committed_s"]
    assert found.attempts[0].times.productive > 0
    assert found.times.data > 0
    assert not [note for note in found.notes if "missing" in note or "torn" in note]
    assert {one.wait.source for one in found.attempts[1:] if one.wait} == {CLOCKS}
