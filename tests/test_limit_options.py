"""`--max-spend` and `--deadline` on the laptop: what they put into a task and refuse, what a plan and a queue say."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import catalogs
import console
import pytest
import yaml
from console import Skyspot
from crafted import NOON, CraftedAttempt

from skyspot.cli import launch as launch_cli
from skyspot.cli import tables
from skyspot.errors import UsageError
from skyspot.jobs import launch
from skyspot.jobs.client import Job
from skyspot.jobs.launch import Existing
from skyspot.jobs.training import TrackedJob
from skyspot.money.report import Given, report_of
from skyspot.runs.limits import limit_note
from skyspot.runs.progress import run_progress
from skyspot.runs.records import read_records
from skyspot.task import document, limits
from skyspot.task.limits import read_deadline, read_max_spend, with_limits, with_market, without_limits
from skyspot.task.options import Options
from skyspot.task.render import edited_by_hand
from trainer.attempt import limits as held
from trainer.attempt import price
from trainer.layout.names import RunPaths

NEW = Existing(None, None, "", None)
NOW = 1_800_000_000.0
SCRIPT = (
    "resources: {accelerators: 'A100:8', use_spot: true}\nrun: python -m trainer.launch --checkpoint-dir /c train.py\n"
)
ROW = {"type": "p4d", "gpu": "A100", "count": "8.0", "cpus": 96.0, "memory": 1152.0, "price": 32.0, "spot": 9.0,
       "region": "us-east-1", "zone": "us-east-1a"}  # fmt: skip


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SkyPilot's folder with one place that has A100:8, and the working directory."""
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    catalogs.write(tmp_path / "runtime", "aws", [ROW])
    return tmp_path / "runtime"


@pytest.fixture
def skyspot(runtime: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Skyspot:
    return console.in_process(monkeypatch, capsys)


def envs(text: str) -> dict[str, str]:
    found: dict[str, str] = yaml.safe_load(text)["envs"]
    return found


# -- values ------------------------------------------------------------------------------------------------------------


def test_a_deadline_is_a_duration_from_now_on_or_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Zurich")
    time.tzset()
    try:
        at = datetime(2027, 6, 1, 8, tzinfo=timezone.utc).timestamp()
        assert [read_deadline(text, NOW) for text in ("12h", "2d", "90", "1.5h")] == [
            NOW + 43200, NOW + 172800, NOW + 90, NOW + 5400
        ]  # fmt: skip
        assert read_deadline("2027-06-01T08:00Z", NOW) == at
        assert read_deadline("2027-06-01 08:00:00+02:00", NOW) == at - 7200
        assert read_deadline("2027-06-01T10:00", NOW) == at, "without a zone: that of this machine"
        assert read_deadline(" NONE ", NOW) is None
        assert read_max_spend("none") is None
        assert read_max_spend("12.5") == 12.5
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (read_max_spend, "x", "--max-spend: 'x' is neither an amount in USD .25. nor `none`"),
        (read_max_spend, "-1", "--max-spend: '-1' is neither"), (read_max_spend, "nan", "'nan' is neither"),
        (read_max_spend, "0", "--max-spend: '0' is neither"), (read_max_spend, "1e-10", "'1e-10' is neither"),
        (limits.read_allowance, "99999999d", "--spend-allowance: '99999999d' is too long; the longest is 11574d"),
        (lambda text: read_deadline(text, NOW), "soon", r"'soon' is neither a time \(2026-12-01T08:00\), a duration"),
        (lambda text: read_deadline(text, NOW), "99999999d", "'99999999d' from now on is after the year 9999"),
        (lambda text: read_deadline(text, NOW), "0001-01-01T00:00+09:00", "is neither a time"),
        (lambda text: read_deadline(text, NOW), "0h", "--deadline: '0h' is not a duration"),
        (lambda text: read_deadline(text, NOW), "2020-01-01", "--deadline: .* has passed"),
        (lambda text: read_deadline(text, NOW), "99999-01-01", "--deadline: '99999-01-01' is neither a time"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_is_refused_in_a_line(read, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(text)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("max_spend", ("1e-9", "0.5", "999999999.9", "1e-10", "1e9", "inf")),
        ("allowance", ("0", "90.5", "123456789", "11574d", "11575d", "-1", "5x", "999999999d")),
        ("deadline", ("1s", "9999-12-31T00:00Z", "9999-12-31T23:00-05:00", "99999999d")),
    ],
)  # fmt: skip
def test_the_trainer_takes_what_the_laptop_takes(option: str, values: tuple[str, ...]) -> None:
    taken = []
    for value in values:
        with suppress(UsageError):
            text = put(put(SCRIPT, deadline="2d"), **{option: value})
            read = held.Limits.from_env(envs(text))
            assert read, value
            assert (read.max_spend_usd, read.deadline) == limits.limits_of(document.tasks(text)[0])
            taken.append(value)
    assert taken == list(values[: len(values) // 2])


@pytest.mark.parametrize(
    "more", ["MAX_SPEND: 1e-10", "MAX_SPEND: 1e9", "SPEND_ALLOWANCE: -1", "SPEND_ALLOWANCE: 5m", "SPEND_ALLOWANCE: 1e9"]
)
def test_what_the_trainer_refuses_in_the_envs_is_refused_before_the_launch(more: str) -> None:
    text = f"run: x\nenvs: {{SKYSPOT_DEADLINE: 2099-01-01T00:00Z, SKYSPOT_{more}}}\n"
    name = f"SKYSPOT_{more.partition(':')[0]}"
    with pytest.raises(held.LimitsError, match=name):
        held.Limits.from_env({key: str(value) for key, value in document.tasks(text)[0].envs.items()})
    with pytest.raises(UsageError, match=f"{name}: .* is not "):
        limits.limits_of(document.tasks(text)[0])


def test_laptop_and_trainer_name_the_same_variables() -> None:
    assert (limits.MAX_SPEND, limits.DEADLINE, limits.ALLOWANCE, limits.PRICES) == (
        held.SPEND_VARIABLE, held.DEADLINE_VARIABLE, held.ALLOWANCE_VARIABLE, price.PRICES
    )  # fmt: skip


# -- in the task -------------------------------------------------------------------------------------------------------


def put(text: str, max_spend: str | None = None, deadline: str | None = None, allowance: str | None = None) -> str:
    return with_limits(text, max_spend, deadline, allowance, NOW)


@pytest.mark.parametrize(
    "text",
    [
        SCRIPT, f"{SCRIPT}envs: {{A: b}}\n", f"{SCRIPT}envs:\n  A: b  # mine\n", f"{SCRIPT}envs:\n",
        "{run: python -m trainer --max-steps 5, envs: {A: b}}\n",
        "run: |\n  exec ~/skyspot/python -m trainer\nenvs: {}\n",
    ],
)  # fmt: skip
def test_limits_stand_in_the_tasks_envs_and_are_no_edit_by_hand(text: str) -> None:
    found = limits.with_prices(put(text, "25", "12h", "0"), '[{"rung":1}]')
    own = {key: value for key, value in envs(found).items() if key.startswith("SKYSPOT_")}
    assert own == {"SKYSPOT_MAX_SPEND": "25", "SKYSPOT_DEADLINE": "2027-01-15T20:00:00Z",
                   "SKYSPOT_SPEND_ALLOWANCE": "0", "SKYSPOT_PRICES": '[{"rung":1}]'}  # fmt: skip
    assert envs(found).get("A", "b") == "b"
    assert without_limits(found) == text
    higher = put(found, "1e3", "none")
    assert envs(higher)["SKYSPOT_MAX_SPEND"] == "1000"
    assert "SKYSPOT_DEADLINE" not in envs(higher)
    assert put(text) == text
    assert put(text, "none", "none") == text


@pytest.mark.parametrize(
    ("run", "holds"),
    [
        ("python train.py", False), ("torchrun train.py", False), ("python -m trainer.launch ours.py", True),
        ("bash -c 'python3 -m trainer --max-steps 5'", True), ("python ours.py", True),
        ("echo python -m trainer", False),
    ],
)  # fmt: skip
def test_a_task_that_starts_no_trainer_of_skyspots_is_refused(tmp_path: Path, run: str, holds: bool) -> None:
    (tmp_path / "train.py").write_text("print()\n")
    (tmp_path / "ours.py").write_text("from trainer import SpotRun\n")
    text = f"workdir: {tmp_path}\nrun: {run}\n"
    for given in ({"max_spend": "5"}, {"deadline": "2h"}):
        if holds:
            assert "SKYSPOT_" in put(text, **given)
            continue
        with pytest.raises(UsageError, match="starts neither skyspot's trainer nor its launcher, which hold the limit"):
            put(text, **given)


@pytest.mark.parametrize(
    ("run", "holds"),
    [
        ("python -m trainer.launch train.py", False), ("python -m trainer.launch not-there.py", False),
        ("python -m trainer.launch train.py --checkpoint-dir /c", False),
        ("python -m trainer.launch --processes 2 --checkpoint-dir=/c train.py", True),
        ("python -m trainer.launch ours.py", True),
        ("SKYSPOT_CHECKPOINT_DIR=/c python -m trainer.launch train.py", True),
    ],
)  # fmt: skip
def test_the_launcher_of_a_script_without_the_trainer_needs_the_runs_folder(
    tmp_path: Path, run: str, holds: bool
) -> None:
    (tmp_path / "train.py").write_text("print()\n")
    (tmp_path / "ours.py").write_text("from trainer import SpotRun\n")
    text = f"workdir: {tmp_path}\nrun: {run}\n"
    if holds:
        assert "SKYSPOT_MAX_SPEND" in put(text, "20")
    else:
        with pytest.raises(UsageError, match=r"--max-spend: .* folder.* Set SKYSPOT_CHECKPOINT_DIR in its envs"):
            put(text, "20")
    assert "SKYSPOT_MAX_SPEND" in put(f"{text}envs: {{SKYSPOT_CHECKPOINT_DIR: /c}}\n", "20")


@pytest.mark.parametrize("line", ["  SKYSPOT_DEADLINE: foo\n", "  echo 'envs: {SKYSPOT_DEADLINE: foo, A: b}'\n"])
def test_a_line_of_the_run_that_looks_like_a_limit_stays(line: str) -> None:
    text = f"run: |\n  cat > x.yaml <<END\n{line}  END\n  python -m trainer\n"
    assert without_limits(text) == text
    assert without_limits(put(text, "5")) == text
    assert without_limits(f"envs: [{line}") == f"envs: [{line}", "no YAML"


def test_a_pipeline_is_refused_and_told_of_the_envs_of_its_tasks() -> None:
    with pytest.raises(UsageError, match=r"this pipeline has 2\. Set SKYSPOT_MAX_SPEND .* in the envs of each task"):
        put(f"{SCRIPT}---\n{SCRIPT}", "5")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("resources: {use_spot: true}\n", "resources: {use_spot: false}\n"),
        ("resources:\n  ordered:\n    - {infra: aws, use_spot: true}\n    - {infra: gcp, use_spot: false}\n",
         "resources:\n  ordered:\n    - {infra: aws, use_spot: false}\n    - {infra: gcp, use_spot: false}\n"),
        ("resources:\n  use_spot: yes # a\n  any_of:\n    - infra: aws\n",
         "resources:\n  use_spot: false # a\n  any_of:\n    - infra: aws\n"),
        ("run: x\n", "run: x\n"),
    ],
)  # fmt: skip
def test_all_rungs_of_a_task_change_to_on_demand_and_keep_their_places(before: str, after: str) -> None:
    assert with_market(before, use_spot=False) == after


@pytest.mark.parametrize(
    "resources",
    [
        "{ordered: [{infra: aws}, {infra: gcp, use_spot: true}]}",
        "{any_of: [{infra: aws}, {infra: gcp}]}",
        "{use_spot: false, ordered: [{infra: aws}, {infra: gcp, use_spot: false}]}",
        "{accelerators: L4}",
        "{}",
        "{ordered: [{infra: aws, use_spot: false}, {infra: gcp, use_spot: true}]}",
    ],
)
def test_all_rungs_of_a_task_change_to_spot(resources: str) -> None:
    found = with_market(f"resources: {resources}\nrun: x\n", use_spot=True)
    assert all(rung.use_spot for rung in document.tasks(found)[0].rungs)


# -- a launch ----------------------------------------------------------------------------------------------------------


def launched(*flags: str, **options: object) -> launch.Launch:
    """As `skyspot launch` prepares it, up to the text that is submitted; then written."""
    given = Options(name="run-001", flags=frozenset({"name", *flags, *options}), **options)  # type: ignore[arg-type]
    found = launch.prepare(given, Path())
    found = launch.with_prices(found, launch_cli._costs(found, NEW, Path()), update_trainer=False)
    launch.write(found, update_trainer=False)
    return found


def test_a_launch_sends_prices_along_renews_them_and_changes_limits_by_the_runs_name(runtime: Path) -> None:
    first = launched(gpus="A100:8", bucket="s3://mine", max_spend="25", deadline="12h")
    [rung] = json.loads(envs(first.text)["SKYSPOT_PRICES"])
    assert rung["places"] == {"aws/us-east-1/us-east-1a": [9.0, 32.0, "p4d"]}
    path = Path(".skyspot/run-001.yaml")
    assert not edited_by_hand(path.read_text())
    catalogs.write(runtime, "aws", [{**ROW, "spot": 7.0}])
    again = launched(max_spend="50", deadline="none")
    assert envs(again.text)["SKYSPOT_MAX_SPEND"] == "50"
    assert "SKYSPOT_DEADLINE" not in envs(again.text)
    assert json.loads(envs(again.text)["SKYSPOT_PRICES"])[0]["places"]["aws/us-east-1/us-east-1a"][0] == 7.0
    assert envs(launched().text)["SKYSPOT_MAX_SPEND"] == "50", "the run's name alone keeps it"
    assert not edited_by_hand(path.read_text())
    same = launched(gpus="A100:8", bucket="s3://mine", max_spend="25")
    assert not any("edit" in note for note in same.notes)
    # On demand, with the rest of the task as it was written.
    on_demand = launched(use_spot=False)
    resources = yaml.safe_load(on_demand.text)["resources"]
    assert (resources["use_spot"], resources["accelerators"]) == (False, "A100:8")
    assert envs(on_demand.text)["SKYSPOT_CHECKPOINT_DIR"].endswith("run-001")
    [rung] = json.loads(envs(on_demand.text)["SKYSPOT_PRICES"])
    assert (rung["spot"], rung["places"]["aws/us-east-1/us-east-1a"][0]) == (False, 32.0)


def test_an_attempt_counts_at_its_regions_dearest_spot_price_where_the_catalog_has_zone_ids(
    runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [("us-east-1", "use1-az1", 9.0), ("us-east-1", "use1-az2", 11.0), ("us-west-2", "usw2-lax1-az1", 20.0)]
    rows = [{**ROW, "region": region, "zone": zone, "spot": spot} for region, zone, spot in ids]
    catalogs.write(runtime, "aws", [*rows, {**rows[1], "type": "dearer", "price": 40.0, "spot": 15.0}])
    sent = envs(launched(gpus="A100:8", bucket="s3://mine", max_spend="25").text)["SKYSPOT_PRICES"]
    assert json.loads(sent)[0]["places"] == {"aws/us-east-1": [11.0, 32.0], "aws/us-west-2": [20.0, 32.0]}
    here = {"cloud": "aws", "region": "us-east-1", "zone": "us-east-1a", "accelerator": "NVIDIA A100-SXM4-40GB",
            "accelerators_per_node": 8}  # fmt: skip
    assert price.price_of(here, price.read_ladder(sent))["usd_per_hour"] == 11.0
    for more, is_said in (({"max_spend": "25"}, True), ({"max_spend": "none"}, False)):
        found = launch.prepare(Options(gpus="A100:8", bucket="s3://mine", name="run-001", **more), Path())
        tables.show_plan(found, NEW, launch_cli._costs(found, NEW, Path()))
        assert ("The catalog of aws has zone ids here (use1-az1)" in capsys.readouterr().out) is is_said


def test_a_change_of_a_run_that_is_not_there_is_refused(skyspot: Skyspot, runtime: Path) -> None:
    for changes in (["--max-spend", "5"], ["--deadline", "2h"], ["--no-use-spot", "--replace"]):
        code, out, err = skyspot("launch", "-n", "gone", *changes)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "this project has no run gone to change: .skyspot/gone.yaml does not exist" in err
    assert launched(gpus="A100:8", bucket="s3://mine", max_spend="5")


def test_on_demand_machines_that_max_hourly_cost_cuts_off_are_refused(runtime: Path) -> None:
    launched(gpus="A100:8", bucket="s3://mine", max_hourly_cost=10.0)
    with pytest.raises(UsageError, match=r"is left: max_hourly_cost 10 .* costs 32\.00\. Raise max_hourly_cost"):
        launched(use_spot=False)
    assert launched(use_spot=True)


def test_an_edit_by_hand_is_still_seen_beside_limits(runtime: Path) -> None:
    launched(gpus="A100:8", bucket="s3://mine", max_spend="25")
    path = Path(".skyspot/run-001.yaml")
    path.write_text(path.read_text().replace("FAILOVER", "EAGER_NEXT_REGION"))
    assert edited_by_hand(path.read_text())
    again = launched(gpus="A100:8", bucket="s3://mine", max_spend="30")
    assert "EAGER_NEXT_REGION" in again.text


def test_a_limit_in_money_needs_the_price_of_each_rung(runtime: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--max-spend: the price of rung 1 is unknown .*State it in skyspot\.yaml, like prices"
    ):
        launched(gpus="A100:8", prefer=("slurm/mine",), bucket="s3://mine", max_spend="25")
    assert launched(gpus="A100:8", prefer=("slurm/mine",), bucket="s3://mine", deadline="2h")
    Path("skyspot.yaml").write_text("prices: [{accelerators: 'A100:8', infra: slurm/mine, on_demand: 16}]\n")
    found = launched(gpus="A100:8", prefer=("slurm/mine",), bucket="s3://mine", max_spend="25")
    places = [rung["places"] for rung in json.loads(envs(found.text)["SKYSPOT_PRICES"])]
    assert places[0] == {"slurm/mine": [16.0, 16.0]}


@pytest.mark.parametrize(
    ("resources", "entries"),
    [
        ("{accelerators: 'A100:8', infra: lambda, use_spot: true}",
         "[{accelerators: 'A100:8', infra: lambda, spot: 8, on_demand: 16}]"),
        ("{accelerators: 'A100:8', infra: lambda}", "[{accelerators: 'A100:8', infra: lambda, on_demand: 16}]"),
        ("{instance_type: n1-standard-8, accelerators: 'V100:2', infra: gcp, use_spot: true}",
         "[{instance_type: n1-standard-8, infra: gcp, spot: 8, on_demand: 16}]"),
        ("{accelerators: {A100: 8, L4: 8}, cloud: gcp, region: us-central1, use_spot: true}",
         "[{accelerators: 'A100:8', infra: gcp/us-central1, spot: 8, on_demand: 16}, "
         "{accelerators: 'L4:8', infra: gcp/us-central1, spot: 8, on_demand: 16}]"),
        ("{infra: slurm/my-cluster/*, cpus: 8+}", '[{infra: "slurm/my-cluster/*", on_demand: 16}]'),
        ("{accelerators: 'A100:8', ordered: [{infra: lambda}, {infra: gcp}, {infra: lambda, use_spot: true}]}",
         "[{accelerators: 'A100:8', infra: lambda, spot: 8, on_demand: 16}, "
         "{accelerators: 'A100:8', infra: gcp, on_demand: 16}]"),
        ("{accelerators: 'H100:8', use_spot: true}", "[{accelerators: 'H100:8', spot: 8, on_demand: 16}]"),
        ("{accelerators: 40GB+, infra: gcp}", None),
    ],
)  # fmt: skip
def test_the_remedy_for_an_unknown_price_is_one_that_works(
    skyspot: Skyspot, runtime: Path, resources: str, entries: str | None
) -> None:
    ours = "python -m trainer.launch --checkpoint-dir /c x.py"
    Path("t.yaml").write_text(f"resources: {resources}\nenvs: {{SKYSPOT_MAX_SPEND: 5}}\nrun: {ours}\n")
    args = ("render", "t.yaml", "-n", "x", "--ignore", "script-not-there")
    code, _, err = skyspot(*args)
    assert (code, "--max-spend: the price of rung" in err) == (2, True), err
    told, _, remedy = err.strip().partition(". State it in skyspot.yaml, like prices: ")
    assert remedy == (entries or ""), err
    if not entries:
        assert told.endswith("(40GB+ names no accelerator to look up; name one)")
        return
    Path("skyspot.yaml").write_text(f"prices: {remedy}\n")
    code, out, err = skyspot(*args)
    assert (code, '"rung":1' in envs(out)["SKYSPOT_PRICES"]) == (0, True), err


def test_where_max_hourly_cost_leaves_no_rung_a_spend_limit_asks_for_no_price(skyspot: Skyspot, runtime: Path) -> None:
    args = ("--gpus", "A100:8", "-n", "x", "--bucket", "s3://mine", "--max-spend", "5", "--max-hourly-cost", "2")
    code, _, err = skyspot("render", *args)
    assert code == 2
    assert "no rung of this task is left: max_hourly_cost 2 cuts it off: its cheapest place costs 9.00. Raise" in err


def test_a_launch_whose_limit_is_reached_already_is_refused(tmp_path: Path, runtime: Path) -> None:
    launched(gpus="A100:8", bucket="s3://mine", max_spend="25", deadline="12h")
    path = Path(".skyspot/run-001.yaml")
    path.write_text(path.read_text().replace(envs(path.read_text())["SKYSPOT_DEADLINE"], "2026-01-01T00:00:00Z"))
    at_a_limit(tmp_path / "records", "max-spend", spent_usd=24.9, max_spend_usd=25)
    stopped = replace(NEW, progress=run_progress(RunPaths(tmp_path / "records")))

    def refused(existing: Existing, **options: str) -> str:
        given = Options(name="run-001", flags=frozenset({"name", *options}), **options)  # type: ignore[arg-type]
        try:
            launch.refuse(launch.prepare(given, Path()), existing, replace=False)
        except UsageError as error:
            return str(error)
        return ""

    passed = "the deadline of run-001, 2026-01-01 00:00 UTC, has passed. Launch with --deadline TIME|none"
    assert refused(NEW) == passed
    assert refused(NEW, max_spend="none") == passed
    assert refused(NEW, deadline="none") == refused(NEW, deadline="2h") == ""
    reached = (
        "run-001 has reached a spend limit of USD 25.00: about USD 24.90 is spent. Launch with --max-spend USD|none"
    )
    assert [refused(stopped, deadline="none", max_spend=usd) for usd in ("20", "25", "25.5", "none")] == [
        reached, reached, "", ""
    ]  # fmt: skip


def test_a_task_of_a_pipeline_whose_deadline_has_passed_is_named(runtime: Path) -> None:
    task = "name: {0}\nenvs: {{SKYSPOT_DEADLINE: {1}}}\nresources: {{accelerators: 'A100:8'}}\nrun: echo\n"
    Path("p.yaml").write_text(f"{task.format('a', '2099-01-01')}---\n{task.format('b', '2026-01-01')}")
    found = launch.prepare(Options(task="p.yaml", name="p"), Path())
    with pytest.raises(
        UsageError, match=r"of b, 2026-01-01 00:00 UTC, has passed\. .* SKYSPOT_DEADLINE in the envs of"
    ):
        launch.refuse(found, replace(NEW, parts=(NEW, NEW)), replace=False)


def test_a_copy_of_the_trainer_that_knows_no_limits_is_refused(runtime: Path) -> None:
    launched(gpus="A100:8", bucket="s3://mine")
    Path(".skyspot/run-001/trainer/attempt/limits.py").unlink()
    with pytest.raises(UsageError, match=r"is of a release that holds no limits\. Replace it: add --update-trainer"):
        launched(max_spend="5")
    assert launched()


def test_limits_of_a_pipeline_stand_in_each_task_and_are_checked(runtime: Path) -> None:
    task = "name: {}\nenvs: {{SKYSPOT_MAX_SPEND: 5}}\nresources: {{accelerators: '{}', use_spot: true}}\nrun: {}\n"
    ours = "python -m trainer.launch --checkpoint-dir /c x.py"
    Path("p.yaml").write_text(f"{task.format('a', 'A100:8', ours)}---\n{task.format('b', 'A100:8', ours)}")
    given = Options(task="p.yaml", name="p", ignore=("script-not-there",))
    found = launch.prepare(given, Path())
    sent = launch.with_prices(found, launch_cli._costs(found, NEW, Path()), update_trainer=False)
    assert sent.text.count("SKYSPOT_PRICES") == 2
    Path("p.yaml").write_text(f"{task.format('a', 'A100:8', ours)}---\n{task.format('b', 'A100:8', 'python x.py')}")
    found = launch.prepare(given, Path())
    with pytest.raises(UsageError, match="SKYSPOT_MAX_SPEND is set, but this task starts neither"):
        launch.with_prices(found, launch_cli._costs(found, NEW, Path()), update_trainer=False)


def test_a_launch_shows_the_limits_and_which_it_is_expected_to_pass(
    runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = launched(gpus="A100:8", bucket="s3://mine", max_spend="5", deadline="2027-01-15T20:00Z")
    costs = launch_cli._costs(found, NEW, Path())
    tables.show_plan(found, NEW, costs)
    assert "Limits:      saves and stops at about USD 5 or at 2027-01-15 20:00 UTC, and stays stopped" in (
        capsys.readouterr().out
    )
    from skyspot.money.plan import Length

    [plan] = [replace(cost, length=Length(1.0, "1 h")) for cost in costs]
    assert costs[0].run_limits_passed == [], "the length is not known"
    assert plan.run_limits_passed[0].startswith("--max-spend 5: ")


# -- plan, render, skyspot.yaml ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--max-spend", "149"), 0, ""),
        (("--max-spend", "148"), 3, "Over limit: --max-spend 148: the expected total (the ladder's mix) is USD 148"),
        (("--deadline", "28h"), 0, ""),
        (("--deadline", "27h"), 3, "the run is expected to take more (the ladder's mix: takes 27.1 h)"),
        (("--max-spend", "9", "--preempted-every", "1m", "--recovery", "8h"), 3, "has no end"),
    ],
)  # fmt: skip
def test_a_plan_exits_with_3_where_the_run_is_expected_to_pass_a_limit(skyspot, args, code: int, said: str) -> None:
    prices = ("--hours", "20", "--prices", "32.77,9.83,7.20,5.50:24")
    found, out, err = skyspot("plan", "--gpus", "A100:8", *prices, *args)
    assert (found, said in err) == (code, True), err
    assert "Limits: saves and stops at" in out
    as_json = json.loads(skyspot("plan", "--gpus", "A100:8", *prices, *args, "--json")[1])
    assert len(as_json["limits_passed"]) == (code == 3)


def test_render_puts_limits_and_prices_in_and_refuses_what_it_has_none_for(skyspot, runtime: Path) -> None:
    code, out, _ = skyspot("render", "--gpus", "A100:8", "-n", "x", "--bucket", "s3://mine", "--max-spend", "5")
    assert code == 0
    assert '"rung":1' in envs(out)["SKYSPOT_PRICES"]
    assert "SKYSPOT_PRICES" not in skyspot("render", "-n", "x", "--bucket", "s3://mine", "--deadline", "5h")[1]
    code, _, err = skyspot("render", "--gpus", "H100:8", "--infra", "slurm/c", "-n", "x", "--max-spend", "5")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--max-spend: the price of rung 1 is unknown" in err
    Path("own.yaml").write_text("run: python train.py\n")
    code, _, err = skyspot("render", "own.yaml", "--deadline", "5h")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--deadline: this task starts neither" in err


def test_limits_may_stand_in_skyspot_yaml(skyspot, runtime: Path) -> None:
    Path("skyspot.yaml").write_text("max_spend: 25\ndeadline: 2099-12-01T08:00:00Z\nspend_allowance: 2m\n")
    found = envs(skyspot("render", "--gpus", "A100:8", "-n", "x", "--bucket", "s3://mine")[1])
    assert (found["SKYSPOT_MAX_SPEND"], found["SKYSPOT_SPEND_ALLOWANCE"]) == ("25", "120")
    assert found["SKYSPOT_DEADLINE"] == "2099-12-01T08:00:00Z"
    Path("skyspot.yaml").write_text("max_spend: lots\n")
    assert "skyspot.yaml: max-spend: 'lots' is neither an amount" in skyspot("render", "-n", "x")[2]


# -- queue and report --------------------------------------------------------------------------------------------------


def at_a_limit(root: Path, cause: str, **facts: object) -> None:
    one = CraftedAttempt(root, 1, NOON)
    one.start()
    one.event("limit", 9, cause=cause, **facts)
    one.end(10, cause, 79, step=5, committed_step=5)


def queue(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    job = Job(id=7, name="run-001", status="FAILED", submitted_at=None, duration_s=1.0, recoveries=0, resources="",
              infra="", details="", task="")  # fmt: skip
    tables.show_queue([TrackedJob(job, run_progress(RunPaths(root)), "")])
    return capsys.readouterr().out


def notes(root: Path) -> str:
    return "\n".join(report_of(read_records(RunPaths(root)), Given(NOON + 20, {}, {})).notes)


def test_queue_and_report_say_which_limit_stopped_a_run_and_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    money, late = tmp_path / "a" / "run-001", tmp_path / "b" / "run-001"
    at_a_limit(money, "max-spend", spent_usd=24.9, max_spend_usd=25)
    at_a_limit(late, "deadline", deadline=NOON)
    spent = "stopped by its spend limit, at about USD 24.90 of 25 (an estimate). To go on: skyspot launch -n run-001 --"
    over = "stopped by its deadline, 2027-01-15 08:00 UTC. To go on: skyspot launch -n run-001 --deadline TIME"
    for root, said in ((money, spent), (late, over)):
        assert f"7: {said}" in queue(root, capsys)
        assert said in notes(root)


def test_queue_and_report_show_the_command_where_only_on_demand_is_in_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "folder"
    one = CraftedAttempt(root, 1, NOON)
    one.start(launch="sky-managed-2027-01-15-08-00-00-000001_run-001_7-0")
    one.event("too-late-for-spot", 9, deadline=NOON + 3600, needed_s=4000.0, left_s=3600.0)
    said = "only on-demand machines can still finish by 2027-01-15 09:00 UTC"
    command = "skyspot launch -n run-001 --no-use-spot --replace"
    for text in (queue(root, capsys), notes(root)):
        assert said in text
        assert command in text
    one.event("too-late-for-spot", 10, deadline=NOON + 3600, needed_s=4500.0, left_s=3500.0, allowance_s=300.0,
              on_demand_in_time=False)  # fmt: skip
    for text in (queue(root, capsys), notes(root)):
        assert "not even on-demand machines can finish by 2027-01-15 09:00 UTC (with the change to them: 1.2 h" in text
        assert command not in text
    one.end(12, "notice", 75)
    assert said not in queue(root, capsys) + notes(root), "that attempt is over"


def test_large_amounts_have_no_exponent() -> None:
    limit = {"cause": "max-spend", "spent_usd": 1249999.5, "max_spend_usd": 1_250_000}
    assert "at about USD 1,249,999.50 of 1,250,000 (an estimate)" in limit_note(limit, "r")


@pytest.mark.parametrize("odd", [None, "x", -1, 1e400, 10**400, [], {}])
def test_odd_numbers_in_a_record_make_no_traceback(odd: object) -> None:
    for cause in ("max-spend", "deadline", odd):
        limit_note({"cause": cause, "spent_usd": odd, "max_spend_usd": odd, "deadline": odd}, "r")
