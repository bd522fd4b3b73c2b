"""`skyspot plan`: its figures, what it says of each rung, its exit status, and what launch shows of it."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import catalogs
import console
import pytest
from console import Skyspot
from crafted import NOON, CraftedAttempt
from support import REPO, clean_env

from bench import startup
from skyspot.cli import launch as launch_cli
from skyspot.cli import tables
from skyspot.jobs import launch
from skyspot.jobs.launch import Existing
from skyspot.money.expected import Preemptions, best_interval_s
from skyspot.money.prices import rung_from_json
from skyspot.money.pricing import price_ladder, read_market
from skyspot.runs import speed as speeds
from skyspot.runs.location import Location
from skyspot.runs.progress import Progress
from skyspot.runs.speed import Speed, measured_speed
from skyspot.task import document
from skyspot.task.options import Options
from trainer.layout.names import RunPaths, list_metrics

TUTORIAL = ("--hours", "20", "--prices", "32.77,9.83,7.20,5.50:24")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SkyPilot's folder, without catalogs; and no network."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def skyspot(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Skyspot:
    """The program in a new folder, without a network: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def no_network(*_: object) -> None:
        raise AssertionError("a plan is offline")

    monkeypatch.setattr(socket.socket, "connect", no_network)

    return console.in_process(monkeypatch, capsys)


def row(**more: object) -> dict[str, object]:
    return {"type": "p4d.24xlarge", "gpu": "A100", "count": "8.0", "cpus": 96.0, "memory": 1152.0, "price": 32.77,
            "spot": 9.83, "region": "us-east-1", "zone": "use1-az1", **more}  # fmt: skip


def only(out: str) -> dict[str, object]:
    [task] = json.loads(out)["tasks"]
    return task


# -- figures -----------------------------------------------------------------------------------------------------------


def test_the_tutorials_run_has_the_tutorials_figures(skyspot: Skyspot) -> None:
    code, out, _ = skyspot("plan", *TUTORIAL)
    assert code == 0
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    expected = {"on-demand": ("655.40", ""), "spot, one region": ("196.60", "70 %"),
                "spot, many regions": ("144.00", "78 %"), "the ladder's mix": ("132.00", "80 %")}  # fmt: skip
    for name, (total, saved) in expected.items():
        assert re.search(rf"\s{re.escape(total)}\s+{saved}", lines[name]), out
    ways = only(skyspot("plan", *TUTORIAL, "--json")[1])["comparison"]["ways"]  # type: ignore[index]
    assert [round(way["usd"], 2) for way in ways] == [655.40, 196.60, 144.00, 132.00]
    assert [way["saving"] and round(way["saving"], 2) for way in ways] == [None, 0.70, 0.78, 0.80]
    # The loss is shown beside; facts for planning say 10 to 15 %.
    assert ways[0]["expected_hours"] == 20
    for way in ways[1:]:
        assert 1.10 < way["expected_hours"] / way["hours"] < 1.15
        assert way["expected_usd"] == pytest.approx(way["usd_per_hour"] * way["expected_hours"])


def test_the_expected_time_is_that_of_simulated_runs() -> None:
    losses = Preemptions(between_s=3600, recovery_s=300, save_cost_s=20, save_interval_s=400)
    draw, total, runs, work = random.Random(1), 0.0, 3000, 10

    for _ in range(runs):
        clock, taken = 0.0, draw.expovariate(1 / losses.between_s)
        for _ in range(work):
            span = losses.interval_s + losses.save_cost_s
            while taken < clock + span:  # Preempted in this interval, and perhaps while it recovers.
                clock = taken
                taken = clock + draw.expovariate(1 / losses.between_s)
                while taken < clock + losses.recovery_s:
                    clock = taken
                    taken = clock + draw.expovariate(1 / losses.between_s)
                clock += losses.recovery_s
            clock += span
        total += clock
    expected = losses.factor() * losses.interval_s * work
    # Daly's restart is the state before each interval; a run that is not preempted there has none to pay for.
    assert total / runs == pytest.approx(expected, rel=0.03)


def test_the_best_interval_is_youngs_and_loses_least() -> None:
    assert best_interval_s(1, 7200) == 120
    assert round(best_interval_s(30, 7200)) == 657
    best = Preemptions(save_cost_s=30)
    for other in (0.5, 0.8, 1.25, 2):
        assert replace(best, save_interval_s=best.interval_s * other).factor() > best.factor()


def test_a_run_that_never_ends_is_said_so(skyspot: Skyspot) -> None:
    _, out, _ = skyspot("plan", *TUTORIAL, "--preempted-every", "1m", "--recovery", "8h")
    assert out.count("never ends") == 3
    assert "inf" not in out
    ways = only(skyspot("plan", *TUTORIAL, "--preempted-every", "1s", "--recovery", "8h", "--json")[1])
    assert ways["comparison"]["ways"][1]["expected_usd"] is None  # type: ignore[index]


def test_the_ways_are_those_of_the_ladder(skyspot: Skyspot, runtime: Path) -> None:
    """On demand where it is cheapest; one region is where that is; the mix is the mean of the spot rungs."""
    catalogs.write(runtime, "aws", [
        row(), row(zone="use1-az2", spot=8.5), row(region="us-west-2", zone="usw2-az1", price=33, spot=7.20),
        row(type="g5.48xlarge", gpu="A10G", price=16, spot=4.0),
        row(region="eu-west-1", zone="euw1", price=31, spot=""),
    ])  # fmt: skip
    code, out, _ = skyspot("plan", "--gpus", "A100:8,A10G:8", "--on-demand-last", "--num-nodes", "2", "--hours", "10",
                           "--json")  # fmt: skip
    assert code == 0
    task = only(out)
    ways = {way["name"]: (way["usd_per_hour"], way["usd"]) for way in task["comparison"]["ways"]}  # type: ignore[index]
    assert ways == {"on-demand": (31, 620), "spot, one region": (8.5, 170), "spot, many regions": (7.2, 144),
                    "the ladder's mix": (5.6, pytest.approx(112))}  # fmt: skip
    assert [rung["total_usd"] for rung in task["rungs"]] == [144, 80, 620]  # type: ignore[attr-defined]
    restricted = only(skyspot("plan", "--gpus", "A100:8", "--prefer", "aws/us-west-2", "--json")[1])
    assert [way["usd_per_hour"] for way in restricted["comparison"]["ways"]] == [31, 7.2, 7.2, 7.2]  # type: ignore[index]


def test_the_length_of_a_run_is_measured_in_its_records(skyspot: Skyspot, half: Path) -> None:
    speed = measured_speed(RunPaths(half))
    assert speed is not None
    assert speed.steps >= 8
    [task] = document.tasks("run: nvidia-smi\n")
    part = launch.Part("half", task, Location(str(half), None))
    assert launch._existing(part, None, "").speed == speed, "launch measures it, too"
    _, out, _ = skyspot("plan", "--steps", "7200", "--speed-of", str(half), "--json")
    assert only(out)["hours"] == pytest.approx(2 * speed.step_s)
    assert f"the mean of {speed.steps} steps of " in str(only(out)["length"])
    _, out, _ = skyspot("plan", "--steps", "7200", "--step-seconds", "0.5", "--save-every", "100", "--json")
    assert (only(out)["hours"], only(out)["preemptions"]["save_interval_s"]) == (1, 50)  # type: ignore[index]


def test_the_commands_of_the_page_run(skyspot: Skyspot, half: Path) -> None:
    Path("my-task.yaml").write_text("resources: {accelerators: 'A100:8', use_spot: true}\nrun: nvidia-smi\n")
    Path("run-001").symlink_to(half)
    lines = re.findall(r"^ {4}skyspot (plan .*)$", (REPO / "docs" / "cost.md").read_text(), re.M)
    assert len(lines) == 5
    for line in lines:
        code, _, err = skyspot(*shlex.split(line))
        assert code == 0, err


def test_the_speed_of_a_run_of_many_attempts_costs_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 9):
        one = CraftedAttempt(tmp_path, number, NOON + number * 1000)
        one.start()
        one.steps(1, 3, 6.0, step_s=number)
    listed = []
    monkeypatch.setattr(speeds, "list_metrics", lambda *args: listed.append(args[1]) or list_metrics(*args))
    assert speeds._speed(RunPaths(tmp_path)) == Speed((5 + 6 + 7 + 8) / 4, 8)
    assert len(listed) == speeds.MAX_FILES


def test_the_comparison_of_the_page_is_what_is_printed(skyspot: Skyspot) -> None:
    lines = skyspot("plan", *TUTORIAL)[1].splitlines()
    printed = [line.rstrip() for line in lines if line.startswith(("on-demand", "spot,", "the ladder's"))]
    page = [line[4:] for line in (REPO / "docs" / "cost.md").read_text().splitlines()]
    assert len(printed) == 4
    assert set(printed) <= set(page)


# -- what is said of each rung -----------------------------------------------------------------------------------------


def rungs(skyspot: Skyspot, *args: str) -> list[dict[str, object]]:
    _, out, err = skyspot("plan", *args, "--json")
    assert "Traceback" not in err
    found = only(out)["rungs"]
    assert isinstance(found, list)
    return found


def test_places_are_counted_and_the_cheapest_are_shown(skyspot: Skyspot, runtime: Path) -> None:
    catalogs.write(runtime, "aws", [row(region=f"r{n % 2}", zone=f"z{n}", spot=5 + n) for n in range(7)])
    _, out, _ = skyspot("plan", "--gpus", "A100:8")
    assert "shown 3 of 7 places (--all), 2 regions" in out
    assert [line.split()[1] for line in out.splitlines() if "p4d" in line] == ["aws/r0/z0", "aws/r1/z1", "aws/r0/z2"]
    assert re.search(r"dearest .* 11\.00\s+32\.77", out)
    _, out, _ = skyspot("plan", "--gpus", "A100:8", "--all")
    assert out.count("p4d.24xlarge") == 7
    assert "shown" not in out


def test_a_rung_that_can_never_be_had_says_why(skyspot: Skyspot, runtime: Path) -> None:
    catalogs.write(runtime, "aws", [row(), row(type="p4d.half", count="4.0", spot="")])
    catalogs.write(runtime, "lambda", catalogs.lambda_cloud())
    cases = {
        "A100:3": "no catalog of aws, lambda offers A100:3 (A100 comes in 4, 8)",
        "H100:8": "no catalog of aws, lambda offers H100:8",
        "A100:4": "aws, lambda has it, but without a price as spot",
    }
    found = rungs(skyspot, "--gpus", ",".join(cases))
    assert [(one["status"], str(one["why"]).removeprefix("not available anywhere: ")) for one in found] == [
        ("never", why) for why in cases.values()
    ]
    [nowhere] = rungs(skyspot, "--gpus", "A100:8", "--infra", "aws/us-west-9")
    assert (nowhere["status"], nowhere["why"]) == (
        "never", "not available anywhere: no catalog of aws offers A100:8 in aws/us-west-9"
    )  # fmt: skip
    [slurm] = rungs(skyspot, "--gpus", "A100:8", "--infra", "slurm/c/p")
    [azure] = rungs(skyspot, "--gpus", "A100:8", "--infra", "azure")
    assert (slurm["status"], azure["status"]) == ("unknown", "unknown")
    assert azure["why"] == "no price catalog of azure is on this machine"


def test_spot_that_is_absent_or_no_bargain_is_said(skyspot: Skyspot, runtime: Path) -> None:
    catalogs.write(runtime, "aws", [row(), row(zone="b", spot=32.77), row(zone="c", spot=40), row(zone="d", spot="")])
    catalogs.write(runtime, "lambda", catalogs.lambda_cloud())
    [found] = rungs(skyspot, "--gpus", "A100:8")
    assert found["remarks"] == [
        "In 2 of 3 places spot costs as much as on-demand, or more.",
        "3 more places have no spot price.",
    ]
    assert found["on_demand_usd_per_hour"] == 10.32, "of Lambda, which has no spot"
    [at_lambda] = rungs(skyspot, "--gpus", "A100:8", "--infra", "lambda")
    assert (at_lambda["use_spot"], at_lambda["status"]) == (False, "offered")


def test_a_size_that_no_machine_has_is_named(skyspot: Skyspot, runtime: Path) -> None:
    catalogs.write(runtime, "aws", [row()])
    Path("t.yaml").write_text("resources: {accelerators: 'A100:8', cpus: 200+, use_spot: true}\nrun: nvidia-smi\n")
    [found] = rungs(skyspot, "t.yaml")
    assert str(found["why"]).endswith("no catalog of aws offers A100:8 with cpus: 200+")


@pytest.mark.parametrize(
    "resources",
    [
        "{accelerators: 'A100[/b]:8', use_spot: true}", "{instance_type: '[red]x[/]', infra: 'aws/[/]'}",
        "{accelerators: 5}", "{accelerators: [1, 2]}", "{accelerators: 'A100:x', cpus: x, memory: [1]}",
        "{accelerators: 'A100:8', max_hourly_cost: .nan}", "{accelerators: 'A100:8', max_hourly_cost: cheap}",
        "{infra: 5, region: [a], zone: {b: c}}", "{cloud: aws, region: us-east-1, cpus: 1e400}", "{ordered: [1, x]}",
        "{accelerators: {A100: -1}}", "{accelerators: {A100: 1.0e+400}}", "{infra: '////'}", "3",
    ],
)  # fmt: skip
def test_odd_resources_make_no_traceback(skyspot: Skyspot, runtime: Path, resources: str) -> None:
    catalogs.write_all(runtime)
    Path("t.yaml").write_text(f"resources: {resources}\nrun: nvidia-smi\n")
    for more in ([], ["--json"]):
        code, out, err = skyspot("plan", "t.yaml", *more)
        assert code in (0, 2, 3)
        assert out if code != 2 else err.startswith(("Error:", "Note:", "t.yaml"))


@pytest.mark.parametrize("price", ["0", "0.0"])
def test_a_price_of_zero_is_no_price(skyspot: Skyspot, runtime: Path, price: str) -> None:
    catalogs.write(runtime, "aws", [row(spot=price), row(zone="b")])
    [found] = rungs(skyspot, "--gpus", "A100:8")
    assert len(found["places"]) == 1  # type: ignore[arg-type]
    assert "1 price of 0 in the catalog is taken as unknown." in found["remarks"]  # type: ignore[operator]


@pytest.mark.parametrize("price", ["NaN", "nan", "inf", "-1", "abc", ""])
def test_what_is_no_price_is_none(skyspot: Skyspot, runtime: Path, price: str) -> None:
    catalogs.write(runtime, "aws", [row(spot=price, price=price), row(zone="b", spot=price)])
    [found] = rungs(skyspot, "--gpus", "A100:8")
    assert (found["status"], found["places"]) == ("never", [])


LIMITED = """\
resources:
  max_hourly_cost: 9
  ordered:
    - {accelerators: "A100:8", use_spot: true, infra: aws/us-east-1}
    - {accelerators: "A100:8", use_spot: true, infra: aws}
    - {accelerators: "A100:8", use_spot: true, infra: gcp}
    - {instance_type: p4d.24xlarge, use_spot: true, infra: aws/us-east-1}
run: nvidia-smi
"""


def test_a_limit_is_held_against_each_rung_as_skypilot_holds_it(skyspot: Skyspot, runtime: Path) -> None:
    """By an instance type's cheapest zone; not on Google Cloud; not for a named instance type."""
    catalogs.write(
        runtime, "aws", [row(), row(region="us-west-2", zone="b", spot=7), row(region="us-west-2", zone="c")]
    )
    catalogs.write(runtime, "gcp", catalogs.gcp())
    Path("t.yaml").write_text(LIMITED)
    code, out, err = skyspot("plan", "t.yaml", "--json")
    assert (code, err) == (3, "")
    found = json.loads(out)
    one, two, three, four = found["tasks"][0]["rungs"]
    assert (one["status"], one["why"]) == ("cut", "max_hourly_cost 9 cuts it off: its cheapest place costs 9.83")
    assert (two["status"], two["limit_passed"], len(two["places"])) == ("offered", None, 3)
    assert "max_hourly_cost 9 does not hold in 2 of 3 places" in two["remarks"][0]
    assert (three["status"], four["status"]) == ("offered", "offered")
    assert "is not applied to it" in three["limit_passed"]
    assert [text.partition(":")[0] for text in found["limits_passed"]] == ["rung 1", "rung 3", "rung 4"]
    code, out, err = skyspot("plan", "t.yaml")
    assert code == 3
    assert "Over limit: rung 1: max_hourly_cost 9 cuts it off" in err
    assert skyspot("plan", "--gpus", "A100:8", "--infra", "aws", "--max-hourly-cost", "9")[0] == 0
    assert skyspot("plan", "--gpus", "A100:8", "--infra", "aws", "--max-hourly-cost", "6.99")[0] == 3


def test_a_plan_travels_as_json(runtime: Path) -> None:
    catalogs.write_all(runtime)
    [task] = document.tasks("resources: {accelerators: [A100:8, L4:8], use_spot: true}\nrun: x\n")
    ladder = price_ladder(task, read_market([task], ()))
    assert len(ladder[0].places) > 20
    assert tuple(rung_from_json(json.loads(json.dumps(rung.to_json()))) for rung in ladder) == ladder


def test_a_machine_without_accelerators_is_skypilots_choice(skyspot: Skyspot, runtime: Path) -> None:
    catalogs.write_all(runtime)
    [found] = rungs(skyspot, "--infra", "aws", "--no-use-spot")
    assert {place["instance_type"] for place in found["places"]} == {"m6i.2xlarge"}  # type: ignore[attr-defined]
    catalogs.write(runtime, "gcp", [])
    Path("t.yaml").write_text("resources: {accelerators: '80GB+', use_spot: true}\nrun: nvidia-smi\n")
    [by_memory] = rungs(skyspot, "t.yaml")
    assert by_memory["status"] == "unknown"


def test_a_pipeline_is_planned_task_by_task(skyspot: Skyspot, runtime: Path) -> None:
    catalogs.write_all(runtime)
    one = "name: {}\nresources: {{accelerators: 'A100:8', use_spot: true}}\nrun: nvidia-smi\n"
    Path("p.yaml").write_text(f"name: two\n---\n{one.format('a')}---\n{one.format('b')}")
    code, out, _ = skyspot("plan", "p.yaml", "--hours", "5")
    assert code == 0
    assert "Task 1, a: " in out
    assert "Task 2, b: " in out
    assert out.count("The cost of 5 h of training") == 2


def test_the_name_of_a_run_is_enough_once_its_task_is_written(skyspot: Skyspot, runtime: Path) -> None:
    catalogs.write_all(runtime)
    assert skyspot("render", "--gpus", "V100:8", "-n", "run-001", "--bucket", "s3://mine", "-o", ".")[0] == 0
    code, out, _ = skyspot("plan", "-n", "run-001")
    assert code == 0
    assert "V100:8" in out
    assert not (Path("home") / ".config").exists(), "a plan writes nothing"


# -- catalogs that are missing, old or damaged -------------------------------------------------------------------------


def test_without_catalogs_it_says_how_to_get_them(skyspot: Skyspot) -> None:
    code, out, _ = skyspot("plan", "--gpus", "A100:8")
    assert code == 0
    assert "No price catalog is on this machine. `sky gpus list --all` has SkyPilot download them" in out
    assert "Rung 1: no price catalog is on this machine." in out


def test_prices_of_skyspot_yaml_are_used_and_replace_a_catalogs(skyspot: Skyspot, runtime: Path) -> None:
    Path("skyspot.yaml").write_text(
        "prices:\n  - {accelerators: 'A100:8', spot: 5, on_demand: 20}\n"
        "  - {accelerators: 'H100:8', infra: slurm/c, on_demand: 16}\n"
    )
    Path("t.yaml").write_text(
        "resources:\n  ordered:\n    - {accelerators: 'A100:8', use_spot: true}\n"
        "    - {accelerators: 'H100:8', infra: slurm/c/p}\nrun: nvidia-smi\n"
    )
    one, two = rungs(skyspot, "t.yaml")
    assert (one["places"][0]["spot_usd_per_hour"], two["places"][0]["on_demand_usd_per_hour"]) == (5, 16)  # type: ignore[index]
    catalogs.write(runtime, "aws", [row(), row(region="us-west-2", zone="b", spot=4)])
    Path("skyspot.yaml").write_text("prices: [{accelerators: 'a100:8', infra: aws/us-east-1, spot: 3, on_demand: 9}]\n")
    [found] = rungs(skyspot, "--gpus", "A100:8")
    assert [(place["region"], place["spot_usd_per_hour"]) for place in found["places"]] == [  # type: ignore[attr-defined]
        ("us-east-1", 3), ("us-west-2", 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stated", "spot_rung", "on_demand_rung"),
    [
        ("{accelerators: 'A100:8', infra: aws, on_demand: 25}",
         [("a", 9.83, 25), ("b", 12, 25)], [(None, 9.83, 25)]),
        ("{accelerators: 'A100:8', spot: 5}",
         [(None, 5, 31)], [("b", 5, 31), ("a", 5, 32.77)]),
        # The narrowest entry counts, whatever their order.
        ("{accelerators: 'A100:8', infra: aws/us-west-2, on_demand: 20}, {accelerators: 'A100:8', on_demand: 25}",
         [("a", 9.83, 25), ("b", 12, 20)], [(None, 12, 20), (None, 9.83, 25)]),
        ("{accelerators: 'A100:8', on_demand: 25}, {accelerators: 'A100:8', infra: aws/us-west-2, on_demand: 20}",
         [("a", 9.83, 25), ("b", 12, 20)], [(None, 12, 20), (None, 9.83, 25)]),
        ("{accelerators: 'A100:8', infra: aws, on_demand: 25}, {accelerators: 'A100:8', infra: aws/us-west-2, spot: 6}",
         [(None, 6, 25), ("a", 9.83, 25)], [(None, 9.83, 25)]),
        ("{accelerators: 'A100:8', infra: aws/eu-west-1, on_demand: 25}",
         [("a", 9.83, 32.77), ("b", 12, 31)], [(None, None, 25), ("b", 12, 31), ("a", 9.83, 32.77)]),
    ],
)  # fmt: skip
def test_a_stated_price_replaces_that_of_its_own_market_alone(
    skyspot: Skyspot, runtime: Path, stated: str, spot_rung: list[object], on_demand_rung: list[object]
) -> None:
    catalogs.write(runtime, "aws", [row(zone="a"), row(region="us-west-2", zone="b", spot=12, price=31)])
    Path("skyspot.yaml").write_text(f"prices: [{stated}]\n")
    found = [
        [(place["zone"], place["spot_usd_per_hour"], place["on_demand_usd_per_hour"]) for place in rung["places"]]  # type: ignore[attr-defined]
        for rung in rungs(skyspot, "--gpus", "A100:8", "--on-demand-last")
    ]
    assert found == [spot_rung, on_demand_rung]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prices: 3", "prices: expected a list of entries"),
        ("prices: [3]", "prices, entry 1: expected keys and values"),
        ("prices: [{acelerators: 'A100:8', spot: 3}]", "unknown key 'acelerators'. Did you mean 'accelerators'?"),
        ("prices: [{accelerators: 'A100:8'}]", "prices, entry 1: state spot or on_demand"),
        ("prices: [{accelerators: 'A100:8', spot: -3}]", "spot: '-3' is not a price"),
        ("prices: [{accelerators: 'A100:8', spot: .nan}]", "spot: 'nan' is not a price"),
        ("prices: [{accelerators: 'A100:8', spot: true}]", "spot: 'True' is not a price"),
        ("prices: [{accelerators: [1], spot: 3}]", "accelerators: '[1]' is not NAME:COUNT"),
        (
            "prices: [{accelerators: 'A100:8', spot: 3}, {infra: 'awz', spot: 3}]",
            "entry 2: infra: 'awz' is in no cloud",
        ),
        ("prices: [{accelerators: 'A100:8', instance_type: x, spot: 3}]", "give one name, and no accelerators"),
        ("price: [{accelerators: 'A100:8', spot: 3}]", "unknown key 'price'. Did you mean 'prices'?"),
    ],
)
def test_a_mistake_in_the_prices_of_skyspot_yaml_is_said_in_a_line(skyspot: Skyspot, text: str, said: str) -> None:
    Path("skyspot.yaml").write_text(text)
    code, out, err = skyspot("plan", "--gpus", "A100:8")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("Error: skyspot.yaml: ")
    assert said in err


def damage(path: Path, kind: str) -> None:
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    if kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "huge":
        with path.open("r+b") as file:
            file.truncate(257 << 20)
    else:
        path.write_bytes({
            "empty": b"", "blank": b"\n\n", "binary": bytes(range(256)) * 40,
            "columns": text.replace("SpotPrice", "Spot").encode(), "torn": text[: len(text) - 30].encode(),
            "torn quote": "".join([lines[0], lines[1][: lines[1].index('"') + 9], "\n", *lines[2:]]).encode(),
            "blank lines": "\n".join(lines).encode(), "windows": text.replace("\n", "\r\n").encode(),
            "with a mark": b"\xef\xbb\xbf" + text.encode(), "header alone": lines[0].encode(),
        }[kind])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "left", "said"),
    [
        ("empty", 0, "is empty; delete it"), ("blank", 0, "is empty; delete it"), ("binary", 0, "has no column"),
        ("columns", 0, "has no column SpotPrice; delete it"), ("torn", 2, "1 row is torn and left out; delete it"),
        ("torn quote", 2, "1 row is torn and left out"), ("a folder", 0, "is no file; delete it"),
        ("huge", 0, "has 257 MB, more than a catalog can have"), ("blank lines", 3, ""), ("windows", 3, ""),
        ("with a mark", 3, ""), ("header alone", 0, ""),
    ],
)  # fmt: skip
def test_a_damaged_catalog_costs_its_own_prices_alone(
    skyspot: Skyspot, runtime: Path, kind: str, left: int, said: str
) -> None:
    path = catalogs.write(runtime, "aws", [row(zone=zone) for zone in "abc"])
    catalogs.write(runtime, "lambda", catalogs.lambda_cloud())
    damage(path, kind)
    code, out, err = skyspot("plan", "--gpus", "A100:8", "--no-use-spot", "--json")
    assert (code, "Traceback" in err) == (0, False)
    problems = [problem for catalog in json.loads(out)["catalogs"] for problem in catalog["problems"]]
    assert [said in problem for problem in problems] == ([True] if said else [])
    [rung] = only(out)["rungs"]  # type: ignore[misc]
    assert [place["cloud"] for place in rung["places"]].count("aws") == left
    assert [place["cloud"] for place in rung["places"]].count("lambda") == 2
    if said:
        assert said in skyspot("plan", "--gpus", "A100:8")[1]


def test_the_age_of_a_catalog_is_that_of_its_download(skyspot: Skyspot, runtime: Path) -> None:
    """Not the file's own time, which a refresh that fails sets, too."""
    import hashlib

    path = catalogs.write(runtime, "aws", [row()])
    assert "aws (age unknown)" in skyspot("plan", "--gpus", "A100:8")[1]
    note = catalogs.folder_of(runtime, ".meta") / "aws" / "vms.csv.md5"
    note.parent.mkdir(parents=True)
    note.write_text(hashlib.md5(path.read_bytes()).hexdigest())
    os.utime(note, (1e9, 1e9))
    os.utime(path)
    _, out, _ = skyspot("plan", "--gpus", "A100:8")
    assert re.search(r"aws \(downloaded \d{4}d ago\)", out)
    assert "`sky gpus list --all` downloads newer ones." in out
    assert json.loads(skyspot("plan", "--gpus", "A100:8", "--json")[1])["catalogs"][0]["downloaded_at"] == 1e9
    catalogs.write(runtime, "aws", [row(spot=1)])
    assert "aws (age unknown)" in skyspot("plan", "--gpus", "A100:8")[1], "edited since"


def test_the_zones_of_aws_are_the_accounts_where_skypilot_knows_them(skyspot: Skyspot, runtime: Path) -> None:
    path = catalogs.write(runtime, "aws", [row(), row(region="me-south-1", zone="mes1-az1", spot=1)])
    (path.parent / "az_mappings-0123abcd.csv").write_text(
        "AvailabilityZone,AvailabilityZoneName\nuse1-az1,us-east-1c\n"
    )
    [found] = rungs(skyspot, "--gpus", "A100:8", "--infra", "aws")
    assert [place["zone"] for place in found["places"]] == ["us-east-1c"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--hours", "0"], "--hours: must be above 0 and below 1,000,000, not 0"),
        (["--hours", "nan"], "--hours: must be above 0 and below 1,000,000, not nan"),
        (["--hours", "2", "--steps", "5"], "--steps gives the length, and so does --hours. Drop one of them"),
        (["--steps", "5"], "--steps needs a speed: add --step-seconds S, or --speed-of RUN"),
        (["--steps", "5", "--step-seconds", "-1"], "--step-seconds: must be above 0 and below 1,000,000, not -1"),
        (["--steps", "5", "--speed-of", "nothing"], "no run 'nothing' here"),
        (["--speed-of", "nothing"], "--speed-of is for --steps N"),
        (["--prices", "1,2,3"], "--prices: '1,2,3' is not ONDEMAND,SPOT_ONE,SPOT_MANY,MIX[:HOURS]"),
        (["--prices", "1,2,3,0"], "is not ONDEMAND"), (["--prices", "1,2,3,nan"], "is not ONDEMAND"),
        (["--prices", "1,2,3,4:0", "--hours", "5"], "is not ONDEMAND"),
        (["--prices", "1,2,3,4:24"], "--prices: MIX:HOURS is compared with the hours of the others. Add --hours H"),
        (["--prices", "1,2,3,4:"], "is not ONDEMAND"), (["--prices", ""], "is not ONDEMAND"),
        (["--recovery", "soon"], "--recovery: 'soon' is not a duration, like 90s, 30m or 2h"),
        (["--save-interval", "0"], "--save-interval: '0' is not a duration"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_a_line(skyspot: Skyspot, args: list[str], said: str) -> None:
    code, out, err = skyspot("plan", "--gpus", "A100:8", *args)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert said in err


# -- quick, and readable -----------------------------------------------------------------------------------------------

_MODULES = """
import sys
from skyspot.cli.main import main
sys.argv = ["skyspot", "plan", "--gpus", "A100:8,A10G:8", "--on-demand-last"]
try: main()
finally: print(*sys.modules, file=sys.stderr)
"""


def test_a_plan_over_100k_rows_loads_no_sky_and_parses_only_the_rows_that_name_its_machines(runtime: Path) -> None:
    """What makes it quick. `python -m bench.startup` measures how quick, beside an empty Python."""
    startup.write_catalogs(runtime)
    done = subprocess.run(
        [sys.executable, "-c", _MODULES], capture_output=True, text=True, env=clean_env(SKY_RUNTIME_DIR=str(runtime))
    )
    assert done.returncode == 0, done.stderr
    assert "A100:8" in done.stdout
    loaded = set(done.stderr.splitlines()[-1].split())
    assert not loaded & {"sky", "torch", "pandas", "numpy", "skyspot.runs.records"}
    [task] = document.tasks("resources: {accelerators: [A100:8, A10G:8], use_spot: true}\nrun: x\n")
    market = read_market([task], ())
    assert {cloud: len(catalog.rows) for cloud, catalog in market.catalogs.items()} == startup.NAMED
    assert {place.cloud for rung in price_ladder(task, market) for place in rung.places} == {"aws", "gcp"}


def in_a_terminal(columns: int, *args: str, **env: str) -> str:
    """What a command prints in a terminal of that width, without its colours."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "skyspot", *args]
    with subprocess.Popen(
        command, stdout=child, stderr=child, stdin=child, env=clean_env(COLUMNS=str(columns), TERM="xterm", **env)
    ):
        os.close(child)
        out = b""
        while data := _read(parent):
            out += data
    os.close(parent)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.decode()).replace("\r", "")


def _read(parent: int) -> bytes:
    try:
        return os.read(parent, 1 << 16)
    except OSError:  # The other end is closed.
        return b""


def test_in_a_terminal_of_80_columns_nothing_is_cut_and_in_a_pipe_nothing_is_wrapped(
    skyspot: Skyspot, runtime: Path
) -> None:
    catalogs.write_all(runtime)
    args = ("plan", "--gpus", "A100:8,T4:1,H100:8", "--prefer", "gcp/us-central1", "--hours", "20",
            "--on-demand-last")  # fmt: skip
    out = in_a_terminal(80, *args, SKY_RUNTIME_DIR=str(runtime))
    assert max(map(len, out.splitlines()[1:])) <= 80, out  # The first is a hint, as every command prints it.
    for word in (
        "a2-highgpu-8g",
        "Standard_ND96asr_v4",
        "us-central1-a",
        "gcp/us-central1",
        "never",
        "the ladder's mix",
    ):
        assert word in out, f"{word} is broken in\n{out}"
    _, out, _ = skyspot(*args)
    assert "gcp/us-central1/us-central1-a" in out
    assert re.search(r"^Prices: .*runpod \(age unknown\), in USD an hour and node\.$", out, re.M)


# -- launch ------------------------------------------------------------------------------------------------------------


def shown(options: Options, existing: Existing, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, object]]:
    """What launch shows before it asks, and its JSON."""
    planned = launch.prepare(options, Path())
    costs = launch_cli._costs(planned, existing, Path())
    tables.show_plan(planned, existing, costs)
    return capsys.readouterr().out, tables.plan_json(planned, existing, None, "new", costs)


def test_launch_shows_the_rungs_with_their_prices(
    skyspot: Skyspot, runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogs.write(runtime, "aws", [row(), row(zone="b", spot=7.2)])
    options = Options(name="run-001", gpus="A100:8,H100:8", on_demand_last=True, bucket="s3://mine", num_nodes=2)
    out, document = shown(options, Existing(None, None, "", None), capsys)
    lines = [line.split() for line in out.splitlines()]
    assert ["1", "A100:8", "2", "spot", "anywhere", "7.20", "78", "%"] in lines
    assert ["2", "H100:8", "2", "spot", "anywhere", "-", "-"] in lines
    assert ["3", "A100:8", "2", "on-demand", "anywhere", "32.77", "-"] in lines
    assert "rung 2: not available anywhere" in out
    assert "total" not in out, "a new run's length is unknown"
    [task] = document["tasks"]  # type: ignore[misc]
    assert (task["prices"][0]["places"][0]["spot_usd_per_hour"], task["hours"]) == (7.2, None)
    # A run that has begun is known to have 500 steps left, of 7.2 s each: an hour on two nodes.
    progress = Progress(1, 520, 1000, None, 500, None, False, None)
    out, document = shown(options, Existing(None, progress, "", None, speed=Speed(7.2, 300)), capsys)
    assert ["1", "A100:8", "2", "spot", "anywhere", "7.20", "78", "%", "14.40"] in [s.split() for s in out.splitlines()]
    assert "total USD: 500 steps that are left, at 7.2 s a step, without preemptions" in out
    assert max(map(len, out.split("Prices:")[0].splitlines())) <= 80


def test_launch_without_catalogs_says_how_to_get_prices(skyspot: Skyspot, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(name="run-001", gpus="A100:8", bucket="s3://mine")
    out, _ = shown(options, Existing(None, None, "", None), capsys)
    assert "Prices:      no price catalog is on this machine\n             `sky gpus list --all` has SkyPilot" in out
