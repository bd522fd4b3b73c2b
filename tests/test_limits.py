"""Limits in money and time, held across attempts: what is reckoned, and what real runs do at a limit.

Recorded node time at the price of each attempt never passes the limit by more than one save and the grace. The figures
are computed again from the raw records, by other code.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from clock import Clock
from crafted import ELSEWHERE, NOON, PLACE, CraftedAttempt
from support import PROGRAMS, clean_env, event, launch, limit_variables, mlp

from skyspot.money.prices import OFFERED, Place, RungPrice
from skyspot.money.travel import LARGEST, travelling
from skyspot.rehearsal.metadata import AwsMetadata, AzureMetadata, GcpMetadata
from trainer.attempt import limits as held
from trainer.attempt import price as prices
from trainer.attempt.ending import DEADLINE, MAX_SPEND
from trainer.attempt.limits import Limits, LimitsError, reckon
from trainer.attempt.price import price_of, read_ladder
from trainer.attempt.record import open_attempt, record, times
from trainer.layout.documents import to_json
from trainer.layout.events import read_progress
from trainer.layout.names import AttemptName, RunPaths, list_attempts
from trainer.notices.here import is_spot_here
from trainer.training import journal

LADDER = [
    {"rung": 1, "spot": True, "machines": ["A100:8"], "on_demand": 40.0,
     "places": {"aws/us-east-1/us-east-1a": [9.0, 32.0, "p4d.24xlarge"], "aws/us-east-1/us-east-1b": [8.0, 33.0]}},
    {"rung": 2, "spot": True, "machines": ["A100-80GB:8"], "on_demand": 41.0,
     "places": {"aws/us-east-1/us-east-1a": [12.0, 41.0]}},
    {"rung": 3, "spot": False, "machines": ["A100:8"], "on_demand": 40.0,
     "places": {"gcp/us-central1": [30.0, 30.0]}},
    {"rung": 4, "spot": True, "machines": ["A100:8"], "on_demand": None, "places": {"slurm/mine": [1.0, None]}},
]  # fmt: skip
A100 = {"accelerator": "NVIDIA A100-SXM4-40GB", "accelerators_per_node": 8}
EAST = {"cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a"}


def ladder(*rungs: dict[str, Any]) -> tuple[prices.Rung, ...]:
    return read_ladder(json.dumps(rungs or LADDER))


# -- the price of a machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({**EAST, **A100}, (1, True, 9.0, 32.0, "p4d.24xlarge")),
        ({**EAST, **A100, "zone": "us-east-1b"}, (1, True, 8.0, 33.0, None)),
        ({**EAST, **A100, "accelerator": "NVIDIA A100-SXM4-80GB"}, (2, True, 12.0, 41.0, None)),
        ({**EAST, **A100, "zone": ""}, (1, True, 9.0, 32.0, "p4d.24xlarge")),  # The dearest zone of the region.
        ({**A100, "cloud": "gcp", "region": "us-central1", "zone": "us-central1-c"}, (3, False, 30.0, 30.0, None)),
        ({**A100, "cloud": "slurm", "region": "mine", "zone": "part"}, (4, True, 1.0, None, None)),
        ({**EAST, "accelerators_per_node": 8}, (2, True, 12.0, 41.0, None)),  # Not known which: the dearest.
        # Elsewhere: the on-demand price, the dearest one of the machine.
        ({**EAST, **A100, "zone": "us-east-1f"}, (None, None, 40.0, 40.0, None)),
        ({**A100, "cloud": "azure", "region": "x"}, (None, None, 40.0, 40.0, None)),
        ({"cloud": "azure"}, (None, None, 41.0, 41.0, None)),
        ({}, (None, None, 41.0, 41.0, None)),
        ({**EAST, "accelerator": "NVIDIA H100 80GB HBM3", "accelerators_per_node": 8}, (2, True, 12.0, 41.0, None)),
    ],
)  # fmt: skip
def test_the_zones_price_counts_and_the_on_demand_price_where_it_is_unknown(place, expected) -> None:
    found = price_of(place, ladder())
    keys = ("rung", "use_spot", "usd_per_hour", "on_demand_usd_per_hour", "instance_type")
    assert tuple(found.get(key) for key in keys) == expected


def test_where_all_rungs_are_on_demand_so_is_a_machine_elsewhere() -> None:
    found = price_of({**A100, "cloud": "azure"}, ladder(LADDER[2]))
    assert found == {"use_spot": False, "usd_per_hour": 40.0, "on_demand_usd_per_hour": 40.0}
    assert price_of({**A100, "cloud": "azure"}, ()) == {}


def test_an_l40s_is_no_l4_and_a_name_in_two_words_is_one() -> None:
    rungs = [
        {"rung": number, "spot": True, "machines": [f"{name}:1"], "places": {"aws/r/z": [float(number), None]}}
        for number, name in enumerate(("L4", "L40S", "RTX4090"), 1)
    ]
    for name, number in (("NVIDIA L4", 1), ("NVIDIA L40S", 2), ("NVIDIA GeForce RTX 4090", 3)):
        place = {"cloud": "aws", "region": "r", "zone": "z", "accelerator": name, "accelerators_per_node": 1}
        assert price_of(place, ladder(*rungs))["rung"] == number


@pytest.mark.parametrize(("is_spot", "rung", "usd"), [(True, 1, 9.0), (False, 2, 32.0), (None, None, 32.0)])
def test_where_spot_and_on_demand_fit_alike_the_cloud_is_asked(is_spot, rung, usd) -> None:
    """A ladder with on-demand last. Without an answer, the on-demand price counts."""
    both = ladder(LADDER[0], {**LADDER[0], "rung": 2, "spot": False, "places": {"aws/us-east-1/us-east-1a": [32, 32]}})
    found = price_of({**EAST, **A100}, both, lambda: is_spot)
    assert (found.get("rung"), found["usd_per_hour"]) == (rung, usd)


@pytest.mark.parametrize("make", [AwsMetadata, GcpMetadata, AzureMetadata])
def test_a_clouds_metadata_says_that_a_machine_is_spot(make, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        assert is_spot_here(server.cloud) is True
    assert is_spot_here(server.cloud) is None, "nobody answers"
    assert is_spot_here("lambda") is None


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "{}", "[1]", "null", '[{"rung": 1}]', '[{"rung":1,"spot":true,"machines":[],"places":{"a":[0]}}]']
)  # fmt: skip
def test_prices_that_are_none_give_none(text: str) -> None:
    assert price_of({**EAST, **A100}, read_ladder(text)) == {}


def rung_price(number: int, places: list[Place], use_spot: bool = True) -> RungPrice:
    return RungPrice(number, "A100:8", "", use_spot, 1, tuple(places), 30.0, None, OFFERED)


def test_the_plans_prices_arrive_at_the_trainer() -> None:
    east = [Place("aws", "us-east-1", f"us-east-1{zone}", kind, usd, 4 * usd)
            for usd, zone, kind in ((8, "a", "p4d"), (9, "a", "p4de"), (10, "b", "p4d"))]  # fmt: skip
    stated = [Place("", None, None, "", 5.0, None)]
    text = travelling([rung_price(1, east), rung_price(2, stated), rung_price(3, [])])
    first, second = read_ladder(text)
    assert (first.machines, first.on_demand_usd_per_hour) == (("A100:8",), 40.0)
    assert first.offer(EAST) == prices.Offer(8.0, 32.0, "p4d")
    assert second.offer(EAST) == second.offer({}) == prices.Offer(5.0, None, "")
    assert travelling([rung_price(3, [])]) == ""


def test_many_places_are_cut_to_the_dearest_of_each_region() -> None:
    places = [
        Place("aws", f"region-{n % 40}", f"region-{n % 40}-zone-{n}", "x" * 20, 1 + n, 5 + n) for n in range(4000)
    ]
    text = travelling([rung_price(1, places)])
    assert len(text) <= LARGEST
    [rung] = read_ladder(text)
    here = {"cloud": "aws", "region": "region-3", "zone": "region-3-zone-3"}
    assert rung.offer(here) == prices.Offer(1 + 3963, 5 + 3963, "")


# -- the options of the environment ------------------------------------------------------------------------------------


def test_limits_are_read_from_the_tasks_variables() -> None:
    assert Limits.from_env({}) is None
    assert Limits.from_env({"SKYSPOT_SPEND_ALLOWANCE": "9"}) is None
    env = {"SKYSPOT_MAX_SPEND": " 25 ", "SKYSPOT_DEADLINE": "2026-12-01T08:00:00Z", "SKYSPOT_SPEND_ALLOWANCE": "0"}
    at = datetime(2026, 12, 1, 8, tzinfo=timezone.utc).timestamp()
    assert Limits.from_env(env) == Limits(25.0, at, 0.0)
    assert Limits.from_env({"SKYSPOT_DEADLINE": "2026-12-01 08:00"}) == Limits(None, at, 300.0), "UTC"


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_SPEND", "x"), ("MAX_SPEND", "nan"), ("MAX_SPEND", "-1"), ("MAX_SPEND", "0"), ("DEADLINE", "soon"),
     ("DEADLINE", "12h")],
)  # fmt: skip
def test_a_value_that_is_none_is_refused_in_a_line(name: str, value: str) -> None:
    with pytest.raises(LimitsError, match=f"SKYSPOT_{name}: '{value}' is not"):
        Limits.from_env({f"SKYSPOT_{name}": value})


# -- what is spent, by hand --------------------------------------------------------------------------------------------

PRICED = {**PLACE, "usd_per_hour": 36.0}


def spent(root: Path, number: int, allowance_s: float = 0.0, **limits: float) -> held.Reckoning:
    return reckon(RunPaths(root), AttemptName(number, f"{number:06x}"), Limits(**{"max_spend_usd": 99.0, **limits},
                                                                               allowance_s=allowance_s))  # fmt: skip


def three(root: Path) -> None:
    """Ended with a set-up; killed on two nodes elsewhere; and the newest."""
    one = CraftedAttempt(root, 1, NOON)
    one.start(setup_s=60, since_setup_s=10.0, launched_s=2.0, place=PRICED)
    one.end(100, "notice")
    two = CraftedAttempt(root, 2, NOON + 1000, boot=5.0)
    two.start(launched_s=3.0, place={**ELSEWHERE, "usd_per_hour": 72.0})
    two.steps(1, 5, 10)
    two.progress(5, 21.5)
    three = CraftedAttempt(root, 3, NOON + 2000)
    three.start(machine="machine-1", setup_s=60, since_setup_s=1010.0, launched_s=4.0, place=PRICED)


def test_earlier_attempts_count_with_set_up_nodes_and_a_minute_without_an_end(tmp_path: Path, clock: Clock) -> None:
    three(tmp_path)
    usd = (60 + 10 + 100) * 36 / 3600 + (3 + 21.5 + 60) * 2 * 72 / 3600
    assert spent(tmp_path, 3).earlier_usd == pytest.approx(usd)
    more = 100 * 36 / 3600 + 100 * 2 * 72 / 3600
    assert spent(tmp_path, 3, allowance_s=100).earlier_usd == pytest.approx(usd + more)


def test_a_set_up_counts_once_for_attempts_on_one_machine(tmp_path: Path, clock: Clock) -> None:
    for number, since in ((1, 10.0), (2, 110.0)):
        one = CraftedAttempt(tmp_path, number, NOON + 100 * (number - 1))
        one.start(machine="the-same", setup_s=60, since_setup_s=since, launched_s=2.0, place=PRICED)
        one.end(50, "hang")
    CraftedAttempt(tmp_path, 3, NOON + 900).start(place=PRICED)
    assert spent(tmp_path, 3).earlier_usd == pytest.approx((60 + 10 + 50 + 2 + 50) * 36 / 3600)


def test_an_attempt_reckons_its_own_time_from_its_set_up_on(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = CraftedAttempt(tmp_path, 1, time.time(), boot=time.monotonic())
    one.start(setup_s=60, since_setup_s=10.0, launched_s=2.0, place={**PRICED, "nodes": 3})
    found = spent(tmp_path, 1, allowance_s=30)
    clock.added += 20
    assert found.node_s == pytest.approx(90, abs=0.1)
    assert found.spent_usd() == pytest.approx((90 + 30) * 3 * 36 / 3600, abs=0.01)
    assert found.spent_usd(10) == pytest.approx((100 + 30) * 3 * 36 / 3600, abs=0.01)


def test_an_attempt_without_a_price_counts_with_the_one_of_its_place_in_the_ladder(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older launch, which sent none along; elsewhere than the ladder, with the on-demand price."""
    for number, place in ((1, {**EAST, **A100}), (2, {**A100, "cloud": "azure"}), (3, PRICED)):
        one = CraftedAttempt(tmp_path, number, NOON + 1000 * number)
        one.start(place=place)
        one.end(100, "hang")
    monkeypatch.setenv("SKYSPOT_PRICES", json.dumps(LADDER))
    assert spent(tmp_path, 3).earlier_usd == pytest.approx(100 * (9 + 40) / 3600)


def test_without_any_price_a_limit_in_money_is_refused_and_a_deadline_is_not(tmp_path: Path) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start()
    with pytest.raises(LimitsError, match="SKYSPOT_PRICES has no price"):
        spent(tmp_path, 1)
    assert reckon(RunPaths(tmp_path), AttemptName(1, "000001"), Limits(None, time.time() - 1)).reached()


def test_torn_and_odd_records_of_other_attempts_do_not_stop_a_run(tmp_path: Path, clock: Clock) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start(place=PRICED).write_text('{"time": 1')
    one.event("restored", 50, step=0)
    one.progress(3, 80)
    two = CraftedAttempt(tmp_path, 2, NOON + 500)
    two.start(place={**PRICED, "nodes": "x", "usd_per_hour": -1}, setup_s="x", launched_s=None)
    two.end(10, "hang")
    (tmp_path / "attempts" / "a0004-00000f").mkdir()
    three = CraftedAttempt(tmp_path, 3, NOON + 900)
    three.start(place=PRICED)
    # The first has no start: 30 s between its records, and a minute. Unknown prices count as this attempt's.
    assert spent(tmp_path, 3).earlier_usd == pytest.approx((30 + 60 + 10 + 60) * 36 / 3600)


def test_an_attempt_whose_nodes_are_not_recorded_counts_with_those_of_this_one(tmp_path: Path, clock: Clock) -> None:
    one = CraftedAttempt(tmp_path, 1, NOON)
    one.start(place=PRICED).write_text('{"time": 1')
    one.event("restored", 50, step=0)
    one.end(80, "notice")
    two = CraftedAttempt(tmp_path, 2, NOON + 900)
    two.start(place={**PRICED, "nodes": 3})
    assert spent(tmp_path, 2).earlier_usd == pytest.approx(30 * 3 * 36 / 3600)


@pytest.mark.parametrize(("left_s", "in_time"), [(1100, None), (900, True), (600, False)])
def test_a_deadline_that_not_even_on_demand_can_meet_is_told_apart(left_s: float, in_time: bool | None) -> None:
    limits = Limits(None, time.time() + left_s, 300.0)
    facts = held.Reckoning(limits, 0.0, None, 1, time.monotonic()).too_late_for_spot(100, 1.0)
    assert (facts and facts["on_demand_in_time"]) is in_time


# -- the look at the limits, beside the bucket -------------------------------------------------------------------------


def journal_at(tmp_path: Path, limits: Limits) -> journal.Journal:
    """A journal whose attempt began now, at a dollar a second."""
    attempt = open_attempt(RunPaths(tmp_path / "run"), launch="one", config={}, binding=None)
    return journal.Journal(attempt, held.Reckoning(limits, 0.0, 3600.0, 1, time.monotonic()))


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_a_bucket_that_refuses_or_hangs_switches_no_limit_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(journal, "LOOK_S", 0.05)
    records, reached, over = journal_at(tmp_path, Limits(0.3, None, 0.0)), threading.Event(), threading.Event()
    if fault == "refuses":
        records.attempt.paths.progress(records.attempt.name).mkdir()
    else:
        records._tasks.put(lambda: over.wait() and None)
    records.hold_limits(lambda found: reached.set())
    assert reached.wait(5)
    assert records.stop_reason
    assert records.stop_reason.ending is MAX_SPEND
    over.set()
    records.end()
    records._thread.join()
    assert event(tmp_path / "run", "limit")["cause"] == "max-spend"


def test_the_longest_of_the_last_steps_is_kept_before_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LOOK_S", 0.05)
    records, reached = journal_at(tmp_path, Limits(25.0, None, 0.0)), threading.Event()
    for step, seconds in enumerate([60.0, 4.0, 4.0, 25.0, 4.0, 4.0, 4.0], 1):
        records.line({"step": step, "step_s": seconds})
    records.hold_limits(lambda found: reached.set())
    assert reached.wait(5)
    records.end()


def test_a_run_says_once_that_only_on_demand_can_finish_and_once_that_nothing_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = journal_at(tmp_path, Limits(None, time.time() + 900, 300.0))
    for step in (1, 2, 3):
        records.line({"step": step, "step_s": 1.0})
    for step in (1000, 900, 900, 600, 600):
        records._progress = {"step": 1000 - step, "max_steps": 1000}
        records._warn_of_deadline()
    said = capsys.readouterr().out
    assert said.count("Not even on-demand machines can finish by") == 1
    assert "Only on-demand" not in said, "nothing has become better"
    records._late.clear()
    for step in (200, 200, 400):
        records._progress = {"step": 1000 - step, "max_steps": 1000}
        records._warn_of_deadline()
    said = capsys.readouterr().out
    assert said.count("Only on-demand machines can still finish by") == 1
    assert said.index("Only on-demand") < said.index("Not even on-demand")
    assert event(tmp_path / "run", "too-late-for-spot")["on_demand_in_time"] is False
    records.end()


# -- twenty attempts, simulated ----------------------------------------------------------------------------------------

RUNGS = [
    {"rung": 1, "spot": True, "machines": ["CPU"], "on_demand": 72.0,
     "places": {"aws/r/r-a": [18.0, 36.0], "aws/r/r-b": [9.0, 36.0], "gcp/s": [24.0, 72.0]}},
]  # fmt: skip
ZONES = {"r-a": 18.0, "r-b": 9.0, "s-a": 24.0, "elsewhere": 72.0}
"""What a node costs by zone, for the test's own sum."""
LIMIT_USD, SAVE_S, GRACE_S, LOOK_S, ALLOWANCE_S = 150.0, 8.0, 5.0, 5.0, 20.0


class Run:
    """A run on machines that come and go, with the trainer's own records and reckoning, by a clock that is set."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, seed: int, limit_usd: float) -> None:
        self.root, self.patch, self.clock, self.draw = root, monkeypatch, clock, random.Random(seed)
        self.limit_usd, self.paths = limit_usd, RunPaths(root / "run")
        self.codes: list[int | None] = []
        started, offset = time.time(), self.clock.added
        monkeypatch.setattr(time, "time", lambda: started + self.clock.added - offset)
        monkeypatch.setenv("SKYSPOT_PRICES", json.dumps(RUNGS))
        for name in ("SKYSPOT_LAUNCH", "SKYSPOT_LAUNCHED_AT", "SKYPILOT_TASK_ID", "SKYPILOT_NUM_GPUS_PER_NODE"):
            monkeypatch.delenv(name, raising=False)

    def attempt(self) -> None:
        """One life of a machine: set-up, the start, steps with saves, and one of several ends."""
        draw, number = self.draw, len(self.codes) + 1
        home = self.root / f"home-{number}"
        (home / "skyspot").mkdir(parents=True)
        self.patch.setenv("HOME", str(home))
        zone = draw.choice([*ZONES])
        cloud, region = ("gcp", "s") if zone == "s-a" else ("aws", "r")
        self.patch.setenv("SKYPILOT_CLUSTER_INFO", json.dumps({"cloud": cloud, "region": region, "zone": zone}))
        self.patch.setenv("SKYPILOT_NUM_NODES", str(draw.choice([1, 1, 3])))
        setup = draw.randrange(10, 60)
        self.clock.added += setup
        (home / "skyspot" / "setup-seconds").write_text(str(setup))
        os.utime(home / "skyspot" / "setup-seconds", (time.time(), time.time()))
        self.clock.added += draw.random() * 3
        attempt = open_attempt(self.paths, launch="one", config={}, binding=None)
        reckoning = reckon(self.paths, attempt.name, Limits(self.limit_usd, None, ALLOWANCE_S))
        if reached := reckoning.reached(GRACE_S):
            record(attempt, "end", code=reached.ending.code, cause=reached.ending.cause)
            self.codes.append(reached.ending.code)
            return
        until = time.monotonic() + draw.choice([1.0, 30.0, 200.0, 600.0])
        how = draw.choice(["kill", "kill", "notice", "torn end"])
        while time.monotonic() < until:
            self.clock.added += LOOK_S
            lives = to_json(times())
            if found := reckoning.reached(LOOK_S + 2 * SAVE_S + GRACE_S):
                self.paths.progress(attempt.name).write_bytes(lives)
                self.clock.added += draw.random() * SAVE_S * 2  # The save under way, and the last one.
                record(attempt, "end", code=found.ending.code, cause=found.ending.cause)
                self.codes.append(found.ending.code)
                return
        self.paths.progress(attempt.name).write_bytes(lives)  # Each one replaces the one before.
        if how == "notice":
            self.clock.added += SAVE_S
        if how != "kill":
            record(attempt, "end", code=75, cause="notice")
        if how == "torn end":
            path = max(self.paths.attempt(attempt.name).glob("*-end.json"))
            path.write_bytes(path.read_bytes()[:30])
        self.clock.added += 40  # What nobody sees.
        self.codes.append(None)


def over_usd(root: Path, *, reckoned: bool) -> float:
    """What the run's node time is beyond the limit, less one save and the grace; from raw files.

    Args:
        root: The run's folder.
        reckoned: Count the allowances too, but not an attempt that a kill has started beyond the limit: it has left
            before it did anything. False: the recorded node time of all attempts.
    """
    total = latest = 0.0
    for folder in sorted((root / "attempts").iterdir()):
        found = {}
        for path in folder.glob("*.json"):
            try:
                found[path.stem.partition("-")[2] or path.stem] = json.loads(path.read_text())
            except ValueError:
                continue
        if reckoned and found.get("end", {}).get("code") == 79 and "progress" not in found:
            break
        start, place = found["start"], found["start"]["place"]
        lived = max(one["monotonic"] for one in found.values()) - start["monotonic"]
        node_s = start["setup_s"] + start["since_setup_s"] + lived + (0 if "end" in found else 60)
        latest = place["nodes"] * ZONES[place["zone"]] / 3600
        total += (node_s + ALLOWANCE_S * reckoned) * latest
    return total - LIMIT_USD - (SAVE_S + GRACE_S) * latest


def simulate(root: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, seed: int) -> Run:
    """Attempts until one has left at the limit; 60 at most."""
    run = Run(root, monkeypatch, clock, seed, limit_usd=LIMIT_USD)
    while run.codes[-1:] != [79] and len(run.codes) < 60:
        run.attempt()
    return run


@pytest.mark.parametrize("seed", range(6))
def test_twenty_attempts_with_kills_without_a_word_never_pass_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, seed: int
) -> None:
    run = simulate(tmp_path, monkeypatch, clock, seed)
    assert run.codes[-1:] == [79]
    assert len(list_attempts(run.paths)) >= 20
    assert over_usd(tmp_path / "run", reckoned=False) <= 0
    over = over_usd(tmp_path / "run", reckoned=True)
    assert over <= 0.001
    assert over > -15, "nor does it stop much too early"


def no_earlier(real: Callable[..., Any]) -> Callable[..., Any]:
    def reckoned(*args: Any) -> Any:
        found = real(*args)
        return held.Reckoning(found.limits, 0.0, found.usd_per_hour, found.nodes, found.began)

    return reckoned


def of_spot(place: dict[str, Any], ladder: Any, is_spot: Any = None) -> dict[str, Any]:
    """Mistake: where the place is unknown, the cheapest spot price counts."""
    found = price_of(place, ladder)
    return found if "rung" in found else {"usd_per_hour": 9.0, "on_demand_usd_per_hour": 36.0}


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "earlier attempts' spend is not counted": lambda p: p.setattr(sys.modules[__name__], "reckon", no_earlier(reckon)),
    "the allowance is not counted": lambda p: p.setattr(
        sys.modules[__name__], "Limits", lambda usd, at, allowance, real=Limits: real(usd, at, 0.0)
    ),
    "nodes are not multiplied": lambda p: p.setattr(held._Life, "nodes", property(lambda life: 1)),
    "an attempt without an end is not counted": lambda p: p.setattr(
        held._Life, "seconds", lambda life, others, real=held._Life.seconds: real(life, others) if life.has_end else 0.0
    ),
    "the minute after the last record is not counted": lambda p: p.setattr(held, "UNSEEN_S", 0.0),
    "set-up is not counted": lambda p: p.setattr(held._Life, "lead_s", lambda life, others: 0.0),
    "the spot price is used where it is unknown": lambda p: p.setattr(prices, "price_of", of_spot),
    "it stops at the limit, without time for the save": lambda p: p.setattr(
        held.Reckoning, "reached", lambda one, ahead_s=0.0, real=held.Reckoning.reached: real(one, -20.0)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_passes_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, mistake: str
) -> None:
    MISTAKES[mistake](monkeypatch)
    over = []
    for seed in range(12):
        simulate(tmp_path / str(seed), monkeypatch, clock, seed)
        over.append(over_usd(tmp_path / str(seed) / "run", reckoned=True))
        if over[-1] > 0.001:
            return
    raise AssertionError(f"not seen: {over}")


# -- real runs ---------------------------------------------------------------------------------------------------------

TASK = "sky-managed-2026-11-30-08-00-00-000000_run-001_7-0"
QUICK = ("--constant", "training.journal.LOOK_S=0.1")


def limited(**limits: object) -> dict[str, str]:
    return clean_env(SKYPILOT_TASK_ID=TASK, **limit_variables(**limits))


def recorded_s(run_dir: Path) -> float:
    """Recorded node time of all attempts, in seconds, which are dollars; no attempt was killed."""
    return sum(float(str(end["monotonic"])) - float(str(start["monotonic"])) + float(str(start["launched_s"]))
               for number in range(len(list_attempts(RunPaths(run_dir))))
               for start, end in [(event(run_dir, "start", number), event(run_dir, "end", number))])  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_saves_at_its_spend_limit_leaves_with_79_and_goes_on_under_a_higher_one(
    tmp_path: Path, processes: int
) -> None:
    run_dir = tmp_path / "run"
    found = mlp(run_dir, "--fault", "limit@6", *QUICK, processes=processes, env=limited(max_spend=900))
    assert found.code == 79, found.output
    end, limit = event(run_dir, "end"), event(run_dir, "limit")
    assert (end["code"], end["cause"], end["step"]) == (79, "max-spend", end["committed_step"])
    assert int(str(end["step"])) in (6, 7)
    assert (limit["cause"], limit["max_spend_usd"], limit["usd_per_hour"]) == ("max-spend", 900, 3600.0)
    assert "The spend limit allows no more than a last save: about USD " in found.output
    assert "skyspot launch -n run-001 --max-spend USD; saving step" in found.output
    place = event(run_dir, "start")["place"]
    assert (place["rung"], place["use_spot"], place["usd_per_hour"]) == (1, True, 3600.0)  # type: ignore[index]

    again = mlp(run_dir, processes=processes, env=limited(max_spend=900))
    assert again.code == 79, again.output
    assert "not started: the spend limit allows no more than a last save" in again.output
    assert event(run_dir, "end")["cause"] == "max-spend"
    assert not event(run_dir, "restored"), "before model or data are touched"

    higher = mlp(run_dir, processes=processes, env=limited(max_spend=1900))
    assert higher.code == 0, higher.output
    assert event(run_dir, "restored")["step"] == end["step"]
    finished = mlp(run_dir, processes=processes, env=limited(max_spend=1))
    assert finished.code == 0, "a finished run is finished, whatever it has cost"


def test_a_run_stops_at_its_deadline(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tomorrow = datetime.fromtimestamp(time.time() + 86400, timezone.utc).isoformat()
    found = mlp(run_dir, "--fault", "limit@6", *QUICK, env=limited(deadline=tomorrow))
    assert found.code == 79, found.output
    end = event(run_dir, "end")
    assert (end["cause"], event(run_dir, "limit")["cause"], end["step"]) == (
        "deadline",
        "deadline",
        end["committed_step"],
    )
    assert end["step"] in (6, 7)
    again = mlp(run_dir, env=limited(deadline=datetime.fromtimestamp(time.time() + 5, timezone.utc).isoformat()))
    assert (again.code, event(run_dir, "end")["cause"]) == (79, "deadline")
    assert "not started: the deadline is reached" in again.output, "the grace alone takes longer"
    later = mlp(run_dir, env=limited(deadline=tomorrow))
    assert later.code == 0, later.output
    assert event(run_dir, "restored")["step"] == end["step"]


@pytest.mark.slow
def test_a_run_that_only_on_demand_can_finish_in_time_says_so_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    at = datetime.fromtimestamp(time.time() + 800, timezone.utc).isoformat()
    args = ("--steps", 60, "--save-every", 60, "--slow", 0.02, *QUICK)
    found = mlp(run_dir, *args, env=limited(deadline=at, spend_allowance=300))
    assert found.code == 0, found.output
    assert found.output.count("Only on-demand machines can still finish by") == 1
    assert "skyspot launch -n run-001 --no-use-spot --replace" in found.output
    late = event(run_dir, "too-late-for-spot")
    assert late["needed_s"] == pytest.approx(900 + float(str(late["steps_left"])) * float(str(late["step_s"])), abs=1)


def test_a_limit_without_prices_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    found = mlp(tmp_path / "run", env=clean_env(SKYSPOT_MAX_SPEND="5"))
    assert found.code == 1
    assert "Error: SKYSPOT_MAX_SPEND is set, but SKYSPOT_PRICES has no price" in found.output
    assert event(tmp_path / "run", "end")["cause"] == "refused"


SLEEPS = """
import signal, sys, time
signal.signal(15, lambda *_: sys.exit(75))
print('up', flush=True)
time.sleep(120)
"""


@pytest.mark.slow
def test_a_script_that_keeps_no_records_is_stopped_by_its_launcher(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SLEEPS)
    run_dir = tmp_path / "run"
    env = {**limited(max_spend=9), "SKYSPOT_CHECKPOINT_DIR": str(run_dir)}
    found = launch(tmp_path / "script.py", env=env, grace=1)
    assert found.code == 79, found.output
    assert "the spend limit allows no more than a last save" in found.output
    assert "the script gets SIGTERM" in found.output
    assert (event(run_dir, "end")["code"], event(run_dir, "end")["cause"]) == (79, "max-spend")
    assert event(run_dir, "limit")["max_spend_usd"] == 9
    assert recorded_s(run_dir) <= 9 + 1
    again = launch(tmp_path / "script.py", env=env, grace=1)
    assert again.code == 79
    assert "not started: the spend limit allows no more than a last save" in again.output
    assert "up" not in again.output
    refused = launch(tmp_path / "script.py", env={**env, "SKYSPOT_PRICES": ""}, grace=1)
    assert (refused.code, event(run_dir, "end")["cause"]) == (1, "refused")


BREAKS = {
    "refuses": "at.rename(at.with_name('away')); at.symlink_to(at)",
    "hangs": "os.mkfifo(at / '0009-bound.json')",
}


@pytest.mark.parametrize("fault", ["refuses", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_launcher_holds_a_limit_whatever_the_bucket_does(tmp_path: Path, fault: str) -> None:
    at = "next(pathlib.Path(os.environ['SKYSPOT_CHECKPOINT_DIR'], 'attempts').iterdir())"
    broken = f"import os, pathlib\nat = {at}\n{BREAKS[fault]}\n"
    (tmp_path / "script.py").write_text(broken + SLEEPS)
    env = {**limited(max_spend=9), "SKYSPOT_CHECKPOINT_DIR": str(tmp_path / "run")}
    found = launch(tmp_path / "script.py", env=env, grace=1, timeout=90)
    assert found.code == 79, found.output
    assert "the script gets SIGTERM" in found.output


@pytest.mark.parametrize("limit", [{"max_spend": 9}, {"deadline": "2099-01-01"}])
def test_a_launcher_without_a_folder_refuses_a_limit(tmp_path: Path, limit: dict[str, object]) -> None:
    (tmp_path / "script.py").write_text("trainer = 'of something else'\nprint('up')\n")
    found = launch(tmp_path / "script.py", env=limited(**limit))
    assert found.code == 1
    assert "is set, but there is no folder for the records" in found.output
    assert "up" not in found.output.splitlines()


UNSTEPPED = {
    "manager": "wait(CheckpointManager(sys.argv[1])._run)\n",
    "block": "with SpotRun(sys.argv[1]) as run:\n    wait(run)\n",
}
WAITS = """
import dataclasses, os, signal, sys, time
from trainer import CheckpointManager, SpotRun
from trainer.training import journal
journal.LOOK_S = 0.1
def wait(run):
    if run.journal:
        run.journal._reckoning = dataclasses.replace(run.journal._reckoning, earlier_usd=EARLIER_USD)
    time.sleep(WAIT_S)
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "processes"), [("manager", 1), ("block", 1), ("block", 2)])
def test_a_limit_is_held_before_the_first_step_while_the_main_thread_sleeps(
    tmp_path: Path, how: str, processes: int
) -> None:
    (tmp_path / "script.py").write_text(WAITS.replace("WAIT_S", "30").replace("EARLIER_USD", "900.0") + UNSTEPPED[how])
    env = limited(max_spend=900)
    found = launch(tmp_path / "script.py", tmp_path / "run", processes=processes, env=env, grace=1, timeout=90)
    assert found.code == 79, found.output
    assert found.output.count("the spend limit allows no more than a last save") == 1
    assert (event(tmp_path / "run", "end")["code"], event(tmp_path / "run", "end")["cause"]) == (79, "max-spend")
    assert event(tmp_path / "run", "limit")


def test_an_attempt_that_is_killed_before_its_first_step_counts_until_then(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        WAITS.replace("WAIT_S", "2").replace("EARLIER_USD", "0.0") + UNSTEPPED["manager"]
    )
    launch(tmp_path / "script.py", tmp_path / "run", env=limited(max_spend=900), grace=1, timeout=50)
    paths = RunPaths(tmp_path / "run")
    [name] = list_attempts(paths)
    lived = float(read_progress(paths, name)["monotonic"]) - float(str(event(tmp_path / "run", "start")["monotonic"]))
    assert lived > 1.5


MANAGED = """
from trainer import CheckpointManager
import sys, time, torch
manager = CheckpointManager(sys.argv[1], save_every=1000)
model = torch.nn.Linear(2, 1)
step = manager.load_latest(model=model)
while True:
    step += 1
    time.sleep(0.05)
    manager.save(step, model=model)
    if manager.interrupted:
        break
"""


def test_a_script_with_a_checkpoint_manager_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(MANAGED)
    found = launch(tmp_path / "script.py", tmp_path / "run", env=limited(max_spend=9), grace=1)
    assert found.code == 79, found.output
    end = event(tmp_path / "run", "end")
    assert (end["cause"], end["step"]) == ("max-spend", end["committed_step"])
    assert int(str(end["step"])) > 0


def test_the_ends_at_a_limit_save_and_are_not_restarted() -> None:
    assert [(one.code, one.saves, one.hold_s()) for one in (MAX_SPEND, DEADLINE)] == [(79, True, 0.0)] * 2
    assert PROGRAMS.is_dir()
