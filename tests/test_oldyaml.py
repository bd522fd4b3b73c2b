"""A SkyPilot YAML of another year comes out in today's spelling, and in nothing else is it another file."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import REPO
from support_sky import refusals

from skyspot.errors import UsageError
from skyspot.migrate.migration import Migrated, to_today
from skyspot.migrate.source import task_yaml
from skyspot.task.options import Options
from skyspot.task.sheet import difference

TUTORIAL = REPO / "tests" / "data" / "tutorial.yaml"


def changed(before: str) -> list[str]:
    """The lines that went and came, without those that stayed."""
    lines = difference(before, to_today(before).text, "x").splitlines()[2:]
    return [line for line in lines if line[0] in "+-"]


def skyspot(*args: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """The real program in a process of its own, and every byte that it writes."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "HOME": str(cwd)}
    return subprocess.run([sys.executable, "-m", "skyspot", *args], cwd=cwd, env=env, capture_output=True, timeout=60)


# -- the tutorial ------------------------------------------------------------------------------------------------------


def test_the_tutorial_changes_in_one_line_and_keeps_its_comment() -> None:
    text = TUTORIAL.read_text()
    assert changed(text) == [
        "-  spot_recovery: failover # auto-restart on another region/cloud",
        "+  job_recovery: failover # auto-restart on another region/cloud",
    ]
    assert to_today(text).changes == ("line 6: spot_recovery -> job_recovery",)


@pytest.mark.slow
def test_skypilot_refuses_the_tutorial_and_takes_what_comes_out(tmp_path: Path) -> None:
    text = TUTORIAL.read_text()
    was, now = refusals([text, to_today(text).text], tmp_path)
    assert "spot_recovery" in str(was)
    assert now is None
    # `use_spot` and a strategy are all that SkyPilot needs to recover a preempted job; 75 is for our trainer alone.
    assert yaml.safe_load(to_today(text).text)["resources"] == {
        "accelerators": "A100:8",
        "use_spot": True,
        "job_recovery": "failover",
    }


# -- rules -------------------------------------------------------------------------------------------------------------

# (the file, what comes of it, what is said of it)
CHANGES = [
    (
        "resources:\n  spot_recovery:   FAILOVER   # mine\nrun: x\n",
        "resources:\n  job_recovery:   FAILOVER   # mine\nrun: x\n",
        "line 2: spot_recovery -> job_recovery",
    ),
    (
        "resources:\n  candidates:  # mine\n  - {accelerators: A100:8}\n  - {cpus: 4, infra: aws}\nrun: x\n",
        "resources:\n  any_of:  # mine\n  - {accelerators: A100:8}\n  - {cpus: 4, infra: aws}\nrun: x\n",
        "line 2: candidates -> any_of (SkyPilot takes the cheapest one available)",
    ),
    (
        "resources: {accelerators: tpu-v3-8, accelerator_args: {tf_version: 2.5.0}}\nrun: x\n",
        "resources: {accelerators: tpu-v3-8, accelerator_args: {runtime_version: 2.5.0}}\nrun: x\n",
        "line 1: tf_version -> runtime_version",
    ),
    (
        "resources:\n  accelerators: tpu-v3-8\n  accelerator_args:\n    tf_version: 2.12 # old\nrun: x\n",
        'resources:\n  accelerators: tpu-v3-8\n  accelerator_args:\n    runtime_version: "2.12" # old\nrun: x\n',
        "line 4: tf_version -> runtime_version",
    ),
    (
        "max_restarts_on_errors: 3\nresources:\n  use_spot: true\nrun: x\n",
        "resources:\n  job_recovery: {max_restarts_on_errors: 3}\n  use_spot: true\nrun: x\n",
        "line 1: moved max_restarts_on_errors to resources.job_recovery",
    ),
    (
        "resources:\n  spot_recovery: FAILOVER  # mine\n\n# a\nmax_restarts_on_errors: 5  # b\nrun: x\n",
        "resources:\n  job_recovery: {strategy: FAILOVER, max_restarts_on_errors: 5}  # mine\n\n# a\n# b\nrun: x\n",
        "line 5: moved max_restarts_on_errors to resources.job_recovery",
    ),
    (
        "resources:\n  job_recovery:\n    strategy: FAILOVER\nrun: x\nmax_restarts_on_errors: 2\n",
        "resources:\n  job_recovery:\n    max_restarts_on_errors: 2\n    strategy: FAILOVER\nrun: x\n",
        "line 5: moved max_restarts_on_errors to resources.job_recovery",
    ),
    (
        "resources: {job_recovery: {max_restarts_on_errors: 2}}\nrun: x\nmax_restarts_on_errors: 2\n",
        "resources: {job_recovery: {max_restarts_on_errors: 2}}\nrun: x\n",
        "line 3: moved max_restarts_on_errors to resources.job_recovery",
    ),
    (
        "run: x\nmax_restarts_on_errors: 2\n",
        "run: x\n\nresources:\n  job_recovery: {max_restarts_on_errors: 2}\n",
        "line 2: moved max_restarts_on_errors to resources.job_recovery",
    ),
    ("resources: {spot_recovery: none}\nrun: x\n", "resources: {job_recovery: none}\nrun: x\n", "-> job_recovery"),
    ("resources: {spot_recovery: NONE}\nrun: x\n", "resources: {job_recovery: none}\nrun: x\n", "'NONE' -> none"),
    (
        "resources:\n  spot_recovery: failover\n  job_recovery: FAILOVER\nrun: x\n",
        "resources:\n  job_recovery: FAILOVER\nrun: x\n",
        "line 2: removed spot_recovery: job_recovery on line 3 has the same value",
    ),
    (
        "resources:\n  gpus: A100:8\n  use_spot: true\nrun: x\n",
        "resources:\n  accelerators: A100:8\n  use_spot: true\nrun: x\n",
        "line 2: gpus -> accelerators",
    ),
    (
        "resources:\n  any_of:\n    - gpus: {A100: 8}\n    - {gpus: L4, spot_recovery: x}\nrun: x\n",
        "resources:\n  job_recovery: x\n  any_of:\n    - accelerators: {A100: 8}\n    - {accelerators: L4}\nrun: x\n",
        "line 4: moved this rung's job_recovery to the top of resources",
    ),
    (
        "resources:\n  max_price: 3.00  # bid\nrun: x\n",
        "resources:\n  max_hourly_cost: 3.00  # bid\nrun: x\n",
        "line 2: max_price -> max_hourly_cost (not a bid: it excludes",
    ),
    ("resources: {max_price: '$2.50/hr'}\nrun: x\n", "resources: {max_hourly_cost: 2.50}\nrun: x\n", "not a bid"),
    ("resources:\n  use_spot: 'True'\nrun: x\n", "resources:\n  use_spot: true\nrun: x\n", "line 2: use_spot: 'True'"),
    ('resources: {"use_spot":"no"}\nrun: x\n', 'resources: {"use_spot":false}\nrun: x\n', "use_spot: 'no' -> false"),
    ("resources: {use_spot: !!str yes}\nrun: x\n", "resources: {use_spot: true}\nrun: x\n", "use_spot: 'yes' -> true"),
    ('num_nodes: "2" # two\nrun: x\n', "num_nodes: 2 # two\nrun: x\n", "line 1: num_nodes: '2' -> 2"),
    (
        "file_mounts: {/c: {name: b-1, persistent: 'true'}}\nrun: x\n",
        "file_mounts: {/c: {name: b-1, persistent: true}}\nrun: x\n",
        "persistent: 'true' -> true",
    ),
    (
        "resources:\n  accelerator_args: {tpu_vm: 'false'}\nrun: x\n",
        "resources:\n  accelerator_args: {tpu_vm: false}\nrun: x\n",
        "tpu_vm: 'false' -> false",
    ),
    ("envs:   # none yet\nrun: x\n", "envs: {}   # none yet\nrun: x\n", "line 1: envs: empty -> {}"),
    ("api_access: true\nrun: x\n", "api_server_access: true\nrun: x\n", "api_access -> api_server_access"),
    (
        "run: x\nexperimental:\n  config_overrides:\n    docker:\n      run_options: [-v]\n",
        "run: x\nconfig:\n    docker:\n      run_options: [-v]\n",
        "line 2: experimental.config_overrides -> config",
    ),
    (
        "experimental: # a\n  config_overrides: {docker: {run_options: [-v]}} # b\nrun: x\n",
        "config: # a\n  {docker: {run_options: [-v]}} # b\nrun: x\n",
        "line 1: experimental.config_overrides -> config",
    ),
    (
        "experimental: {config_overrides: {docker: {}}}\nrun: x\n",
        "config: {docker: {}}\nrun: x\n",
        "line 1: experimental.config_overrides -> config",
    ),
]
PLACES = [
    (
        "resources:\n  infra: aws\n  region: us-east-1  # near\nrun: x\n",
        "resources:\n  infra: aws/us-east-1\n  # near\nrun: x\n",
        "line 2: infra: aws -> aws/us-east-1, including the region",
    ),
    (
        "resources: {cloud: AWS, infra: aws/us-east-1, zone: us-east-1a}\nrun: x\n",
        "resources: {infra: aws/us-east-1/us-east-1a}\nrun: x\n",
        "line 1: removed cloud: infra contains it",
    ),
    (
        "resources: {infra: k8s/a/b, cloud: kubernetes}\nrun: x\n",
        "resources: {infra: k8s/a/b}\nrun: x\n",
        "removed cloud",
    ),
    (
        "resources: {infra: '*/us-east-1', cloud: aws}\nrun: x\n",
        "resources: {infra: aws/us-east-1}\nrun: x\n",
        "including the cloud",
    ),
    (
        "resources:\n  cloud: aws\n  region: us-east-1\n  ordered:\n    - infra: gcp\n"
        "    - region: us-west-2\n    - {}\n"
        "run: x\n",
        "resources:\n  infra: aws/us-east-1\n  ordered:\n    - infra: gcp\n"
        "    - infra: aws/us-west-2\n    - {}\nrun: x\n",
        "line 6: region: us-west-2 -> infra: aws/us-west-2",
    ),
    (
        "resources:\n  infra: aws/us-east-1\n  any_of: [{cloud: gcp}, {zone: us-east-1b}]\nrun: x\n",
        "resources:\n  infra: aws/us-east-1\n  any_of: [{infra: gcp}, {infra: aws/us-east-1/us-east-1b}]\nrun: x\n",
        "line 3: cloud: gcp -> infra: gcp",
    ),
    (
        "resources:\n  region: us-east-1\n  any_of: [{infra: gcp}, {cloud: aws}]\nrun: x\n",
        'resources:\n  infra: "*/us-east-1"\n  any_of: [{infra: gcp}, {infra: aws/us-east-1}]\nrun: x\n',
        "line 2: region: us-east-1 -> infra: */us-east-1",
    ),
]
RECOVERIES = [
    (
        "resources:\n  use_spot: true\n  ordered:\n    - accelerators: A100:8\n      job_recovery: failover  # one\n"
        "    - job_recovery: # two\n        strategy: EAGER_NEXT_REGION\n      accelerators: L4:8\nrun: x\n",
        "resources:\n  job_recovery: failover\n  use_spot: true\n  ordered:\n    - accelerators: A100:8\n      # one\n"
        "    - accelerators: L4:8\nrun: x\n",
        "line 6: removed job_recovery: {strategy: EAGER_NEXT_REGION} of a rung",
    ),
    (
        "resources:\n  job_recovery: failover\n"
        "  any_of: [{cpus: 2}, {cpus: 4, job_recovery: eager_next_region}]\nrun: x\n",
        "resources:\n  job_recovery: failover\n  any_of: [{cpus: 2}, {cpus: 4}]\nrun: x\n",
        'line 3: removed job_recovery: "eager_next_region" of a rung',
    ),
    (
        "resources:\n  job_recovery: failover\n"
        "  any_of: [{job_recovery: {max_restarts_on_errors: 3}}, {cpus: 4}]\nrun: x\n",
        "resources:\n  job_recovery: {max_restarts_on_errors: 3}\n  any_of: [{}, {cpus: 4}]\nrun: x\n",
        "line 3: moved the first rung's job_recovery to the top of resources",
    ),
]
EXIT_CODES = [
    (
        "resources:\n  job_recovery: failover # mine\nrun: python -m trainer\n",
        "resources:\n"
        "  job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [75]} # mine\nrun: python -m trainer\n",
        "line 2: added 75 to recover_on_exit_codes",
    ),
    (
        "run: exec ~/skyspot/python -m trainer.launch train.py",
        "run: exec ~/skyspot/python -m trainer.launch train.py\n\nresources:\n"
        "  job_recovery: {recover_on_exit_codes: [75]}\n",
        "line 1: added 75",
    ),
    (
        "resources:\n  cpus: 2\nrun: python -m trainer\n",
        "resources:\n  job_recovery: {recover_on_exit_codes: [75]}\n  cpus: 2\nrun: python -m trainer\n",
        "line 1: added 75",
    ),
    (
        "resources: {job_recovery: {strategy: FAILOVER, recover_on_exit_codes: 3}}\nrun: python -m trainer\n",
        "resources: {job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [3, 75]}}\nrun: python -m trainer\n",
        "line 1: added 75",
    ),
    (
        "resources:\n  job_recovery:\n    recover_on_exit_codes:\n    - 3  # mine\nrun: python -m trainer\n",
        "resources:\n  job_recovery:\n    recover_on_exit_codes:\n    - 3  # mine\n    - 75\nrun: python -m trainer\n",
        "line 2: added 75",
    ),
    (
        "resources:\n  job_recovery:\n    strategy: none\nrun: python -m trainer\n",
        "resources:\n  job_recovery:\n    recover_on_exit_codes: [75]\n    strategy: EAGER_NEXT_REGION\n"
        "run: python -m trainer\n",
        "line 2: added 75",
    ),
    (
        "resources: {any_of: [{cpus: 2, job_recovery: failover}, {job_recovery: failover}]}\nrun: python -m trainer\n",
        "resources: {job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [75]}, any_of: [{cpus: 2}, {}]}\n"
        "run: python -m trainer\n",
        "line 1: added 75",
    ),
]
# Each is odd as YAML, and what is changed in it is one thing.
HARD = [
    ("resources: &r\n  spot_recovery: failover\nrun: x\n", "resources: &r\n  job_recovery: failover\nrun: x\n"),
    ("resources: {use_spot: &s 'true'}\nrun: x\n", "resources: {use_spot: &s true}\nrun: x\n"),
    ("name: &n 'true'\nresources: {use_spot: *n}\nrun: x\n", "name: &n 'true'\nresources: {use_spot: true}\nrun: x\n"),
    (
        "resources:\n  any_of:\n    - &a {cpus: 2, gpus: L4}\n    - *a\n    - <<: *a\n      cpus: 4\nrun: x\n",
        "resources:\n  any_of:\n    - &a {cpus: 2, accelerators: L4}\n    - *a\n    - <<: *a\n      cpus: 4\nrun: x\n",
    ),
    (
        "resources:\n  any_of:\n    - &a {cloud: aws, cpus: 2}\n    - {<<: *a, infra: gcp}\nrun: x\n",
        "resources:\n  any_of:\n    - &a {infra: aws, cpus: 2}\n    - {<<: *a, infra: gcp}\nrun: x\n",
    ),
    (
        "resources:\n  # above\n\n  spot_recovery:\n    # between\n    failover\n  # below\n\nrun: x\n",
        "resources:\n  # above\n\n  job_recovery:\n    # between\n    failover\n  # below\n\nrun: x\n",
    ),
    (
        "resources: {infra: aws, # a\n  cloud: aws, # b\n  cpus: 2}\nrun: x\n",
        "resources: {infra: aws, # a\n   # b\n  cpus: 2}\nrun: x\n",
    ),
    ("resources: {cloud: aws, infra: aws,}\nrun: x\n", "resources: {infra: aws,}\nrun: x\n"),
    (
        "resources:\r\n  infra: aws\r\n  zone: z\r\n  any_of:\r\n"
        "  - job_recovery: failover\r\n    cpus: 2\r\n  - cpus: 4\r\n",
        "resources:\r\n  job_recovery: failover\r\n  infra: aws/*/z\r\n  any_of:\r\n  - cpus: 2\r\n  - cpus: 4\r\n",
    ),
    ("run: x\nresources:\n  infra: aws\n  cloud: aws", "run: x\nresources:\n  infra: aws"),
    ("run: x\nresources:\n  spot_recovery: failover", "run: x\nresources:\n  job_recovery: failover"),
    ("\ufeffresources:\n  gpus: L4\nrun: x\n", "\ufeffresources:\n  accelerators: L4\nrun: x\n"),
    ("\ufeffapi_access: true\nrun: x\n", "\ufeffapi_server_access: true\nrun: x\n"),
    ("# é 你好 😀\nname: é😀\nresources: {gpus: L4}\n", "# é 你好 😀\nname: é😀\nresources: {accelerators: L4}\n"),
    (
        '{"resources": {"gpus": "L4", "use_spot": "true"}, "run": "x"}',
        '{"resources": {"accelerators": "L4", "use_spot": true}, "run": "x"}',
    ),
    ("--- # one\nresources:\n  gpus: L4\nrun: x\n...\n", "--- # one\nresources:\n  accelerators: L4\nrun: x\n...\n"),
    (
        "--- # one\nrun: python -m trainer\n...\n",
        "--- # one\nrun: python -m trainer\n\nresources:\n  job_recovery: {recover_on_exit_codes: [75]}\n...\n",
    ),
]


def check(before: str, after: str) -> Migrated:
    made = to_today(before)
    assert made.text == after
    assert to_today(after) == Migrated(after, ())
    return made


@pytest.mark.parametrize(("before", "after", "said"), [*CHANGES, *PLACES, *RECOVERIES, *EXIT_CODES])
def test_an_old_spelling_becomes_todays_and_is_said_with_its_line(before: str, after: str, said: str) -> None:
    changes = check(before, after).changes
    assert any(said in change for change in changes), changes
    assert all("\n" not in change for change in changes)


@pytest.mark.parametrize(("before", "after"), HARD)
def test_hard_yaml_changes_in_one_thing(before: str, after: str) -> None:
    assert check(before, after).changes


@pytest.mark.slow
def test_skypilot_takes_what_comes_out_of_every_old_spelling(tmp_path: Path) -> None:
    texts = [after for _, after, *_ in [*CHANGES, *PLACES, *RECOVERIES, *EXIT_CODES]]
    # A strategy that is none, and places that no small catalog holds, are not what this is about.
    known = [text for text in texts if "job_recovery: x" not in text and "us-" not in text and "k8s" not in text]
    assert len(known) > 25
    assert dict(zip(known, refusals(known, tmp_path), strict=True)) == dict.fromkeys(known)


RESOURCES = [
    ["", "spot_recovery: failover", "job_recovery: none", "job_recovery: {max_restarts_on_errors: 2}"],
    ["", "gpus: A100:8", "accelerators: {A100: 8}"],
    ["", "max_price: '3.50'"],
    ["", "infra: aws", "cloud: aws\n  region: us-east-1"],
    ["use_spot: 'true'"],
]
RUNGS = [
    "",
    "ordered: [{infra: gcp, spot_recovery: failover}, {cloud: aws, use_spot: 'no'}]",
    "any_of: [{gpus: L4:8}, {job_recovery: {strategy: eager_next_region}, max_price: 9, cloud: aws}]",
]


@pytest.mark.slow
@pytest.mark.parametrize("nth", [pytest.param(1, marks=pytest.mark.slow), 5], ids=["all", "one in five"])
def test_skypilot_takes_what_comes_out_of_every_combination_of_old_spellings(tmp_path: Path, nth: int) -> None:
    texts = []
    for *lines, rungs in itertools.product(*RESOURCES, RUNGS):
        if "region" in lines[3] and "gcp" in rungs:
            continue  # There is no such region: what the file means is wrong, not how it says it.
        block = "".join(f"  {line}\n" for line in [*lines, rungs] if line)
        texts.append(f"resources:\n{block}num_nodes: '2'\nenvs:\nexperimental:\n  config_overrides: {{}}\nrun: x\n")
    assert len(texts) > 150
    migrated = [to_today(text).text for text in texts[::nth]]
    assert {text: why for text, why in zip(migrated, refusals(migrated, tmp_path), strict=True) if why} == {}


# -- what stays --------------------------------------------------------------------------------------------------------

MODERN = [
    "name: x\nrun: echo\n",
    "resources:\n  cloud: aws\n  region: us-east-1\n  zone: us-east-1a\nrun: x\n",
    "resources:\n  any_of:\n    - infra: aws\n    - cloud: gcp\nrun: x\n",
    "resources:\n  infra: aws\n  region:\nrun: x\n",
    "resources: {ordered: [{job_recovery: failover}, {job_recovery: {strategy: FAILOVER}}]}\nrun: x\n",
    "resources: {ordered: [{job_recovery: EAGER_NEXT_REGION}, {cpus: 2}]}\nrun: x\n",
    "resources: {job_recovery: {recover_on_exit_codes: 75}}\nrun: python -m trainer\n",
    "resources: {job_recovery: {strategy: EAGER_NEXT_REGION, recover_on_exit_codes: [3]}}\nrun: python train.py\n",
    "run: |\n  # python -m trainer\n  python train.py  # not python -m trainer\n",
    "run: python -m trainer.check\n",
    "run: python -m pip install trainer\n",
    "run: echo python -m trainer\n",
    "setup: python -m trainer\nrun: x\n",
    "file_mounts:\n  /data:\n    source: s3://my-data\nrun: x\n",
    "envs: {A: 'true', spot_recovery: 'yes', use_spot: \"no\", B: ''}\nrun: x\n",
    "envs: {A: .nan, B: 2024-01-01}\nsecrets: {TOKEN: null}\nrun: x\n",
    "resources: {labels: {spot_recovery: 'true', gpus: 'no'}}\nrun: spot_recovery\n",
    "inputs: {s3://x: 3}\noutputs: {s3://y: 3}\nrun: x\n",
    "\ufeffname: x\r\nrun: |\r\n  echo\r\n\r\n# end",
    "run: x",
]


@pytest.mark.parametrize("text", MODERN)
def test_a_yaml_that_skypilot_takes_today_stays_as_it_is(text: str) -> None:
    assert to_today(text) == Migrated(text, ())


@pytest.mark.parametrize("name", ["finetune", "command"])
def test_what_our_templates_render_stays_as_it_is(name: str) -> None:
    parameters = {"command": "true"} if name == "command" else {}
    for more in ({}, {"gpus": "A100:8,L4:8", "on_demand_last": True, "num_nodes": 2}):
        text = task_yaml(Options(task=name, name="r", parameters=parameters, **more)).text
        assert to_today(text) == Migrated(text, ())


# -- what cannot be done -----------------------------------------------------------------------------------------------

REFUSED = [
    ("run: x\nenvs:\n  HF_TOKEN: # yours\n", "line 3: HF_TOKEN in `envs` has no value", "--secret HF_TOKEN"),
    ("envs:\n  A: 1\n  B: null\n  C: ~\n", "lines 3, 4: B, C in `envs`", "--env B=..."),
    ("resources:\n  infra: aws\n  cloud: gcp\n", "line 3: cloud: 'gcp' contradicts infra: 'aws' on line 2", "Keep"),
    (
        "resources:\n  infra: '*/ctx'\n  cloud: kubernetes\n  zone: z\n",
        "line 2: cloud: 'kuber",
        "by hand",
    ),
    ("resources:\n  zone: b\n  infra: aws/a/c\n", "line 2: zone: 'b' contradicts infra: 'aws/a/c' on line 3", "Keep"),
    (
        "resources:\n  gpus: L4\n  accelerators: T4\n",
        "line 2: gpus is called accelerators today, which has another value on line 3",
        "Keep",
    ),
    (
        "resources:\n  spot_recovery: failover\n  job_recovery: eager_next_region\n",
        "line 2: spot_recovery is called job_recovery today, which has another value on line 3",
        "Keep",
    ),
    (
        "resources:\n  candidates: [{cpus: 2}]\n  any_of: [{cpus: 4}]\n",
        "line 2: candidates is called any_of today, which has another value on line 3",
        "Keep",
    ),
    (
        "resources:\n  candidates: [{cpus: 2}]\n  ordered: [{cpus: 4}]\n",
        "line 2: candidates is called any_of today",
        "Keep",
    ),
    (
        "max_restarts_on_errors: 3\nresources: {job_recovery: {max_restarts_on_errors: 2}}\n",
        "line 1: max_restarts_on_errors: 3 contradicts the one in resources.job_recovery",
        "Keep",
    ),
    ("resources:\n  max_price: auto\n", "line 2: max_price: 'auto' is not a price", "max_hourly_cost: 3.50"),
    ("resources:\n  max_price: 0\n", "line 2: max_price: '0' is not a price", "max_hourly_cost: 3.50"),
    ("config: {}\nexperimental: {config_overrides: {}}\n", "line 2: experimental.config_overrides is", "line 1"),
    ("resources: &r\n  any_of: [*r]\n  gpus: x\n", "line 1: this anchor contains an alias of itself", ""),
    ("a: 1\n---\nb: 2\n", "2 documents", "one task"),
    ("resources:\n\tgpus: x\n", "not readable as YAML", "line 2"),
    ("- x\n", "expected one task", "this is a list"),
    ("x\n", "expected one task", "this is a single value"),
    ("# x\n", "expected one task", "the file is empty"),
    ("resources: {gpus: L4, labels: {a: 2024-13-45}}\nrun: x\n", "not readable as YAML", ""),
    ('a: "\\UFFFFFFFF"\n', "not readable as YAML", ""),
    (
        "envs: {A: &k gpus}\nresources: {*k : L4}\nrun: x\n",
        "line 1: gpus -> accelerators",
        "Change by hand",
    ),
]


@pytest.mark.parametrize(("text", "what", "remedy"), REFUSED)
def test_what_has_no_meaning_today_is_refused_with_line_and_remedy(text: str, what: str, remedy: str) -> None:
    with pytest.raises(UsageError) as refused:
        to_today(text)
    assert what in str(refused.value)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_variable_without_a_value_may_get_it_from_elsewhere() -> None:
    text = "run: x\nenvs:\n  HF_TOKEN: # yours\n"
    assert to_today(text, given={"HF_TOKEN"}) == Migrated(text, ())


# -- the command -------------------------------------------------------------------------------------------------------


def test_render_prints_the_result_and_says_the_changes_beside_it(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_bytes(TUTORIAL.read_bytes())
    done = skyspot("render", "old.yaml", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.decode() == to_today(TUTORIAL.read_text()).text
    assert done.stderr.decode() == "old.yaml, line 6: spot_recovery -> job_recovery.\n"


def test_render_diff_prints_the_change_alone_and_patch_takes_it(tmp_path: Path) -> None:
    before = "name: x\r\nresources:\r\n  infra: aws\r\n  gpus: L4:8\r\n  cloud: aws"
    (tmp_path / "old.yaml").write_bytes(before.encode())
    done = skyspot("render", "--diff", "old.yaml", "-n", "other", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"--- old.yaml\n+++ old.yaml\n@@")
    (tmp_path / "change").write_bytes(done.stdout)
    patched = subprocess.run(["git", "apply", "-p0", "change"], cwd=tmp_path, capture_output=True, text=True)
    assert patched.returncode == 0, patched.stderr
    after = (tmp_path / "old.yaml").read_bytes()
    assert after == b"name: other\r\nresources:\r\n  infra: aws\r\n  accelerators: L4:8"
    again = skyspot("render", "--diff", "old.yaml", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, b"")


def test_a_modern_yaml_is_printed_byte_for_byte(tmp_path: Path) -> None:
    for text in MODERN:
        (tmp_path / "task.yaml").write_bytes(text.encode())
        assert task_yaml(Options(task=str(tmp_path / "task.yaml"))).text == text
    assert skyspot("render", "task.yaml", cwd=tmp_path).stdout == MODERN[-1].encode()
    (tmp_path / "task.yaml").write_bytes(MODERN[-2].encode())
    assert skyspot("render", "task.yaml", cwd=tmp_path).stdout == MODERN[-2].encode()


@pytest.mark.parametrize("args", [["finetune"], ["old.yaml", "-o", "."], ["old.yaml", "--json"]])
def test_diff_is_refused_where_there_is_none_to_print(tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "old.yaml").write_bytes(TUTORIAL.read_bytes())
    done = skyspot("render", "--diff", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert b"--diff" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / ".skyspot").exists()


def test_a_refusal_names_the_file_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("resources:\n  infra: aws\n  cloud: gcp\nrun: x\n")
    done = skyspot("render", "old.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(b"Error: old.yaml, line 3: cloud: 'gcp' contradicts")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("value", ["2024-13-45", "!!bool x", "!tag x", "{[a]: b}", "&a [*a]", "\tx"])
def test_a_value_that_python_cannot_hold_is_refused_in_a_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "own.yaml").write_text(f"run: x\nresources: {{cpus: 2}}\nenvs:\n  A: {value}\n")
    with pytest.raises(UsageError, match=r"own.yaml.*(not readable as YAML|alias of itself)"):
        task_yaml(Options(task=str(tmp_path / "own.yaml")))


def rendered(folder: Path, text: str, **more: object) -> dict:
    (folder / "own.yaml").write_text(text)
    return yaml.safe_load(task_yaml(Options(task=str(folder / "own.yaml"), **more)).text)


def test_values_from_the_command_line_fill_what_the_file_leaves_empty(tmp_path: Path) -> None:
    text = "run: x\nenvs:\n  WHERE:   # fill in\n  HF_TOKEN:\n  A: b\n"
    made = rendered(tmp_path, text, env={"WHERE": "here"}, secret={"HF_TOKEN": None})
    assert made == {"run": "x", "envs": {"WHERE": "here", "A": "b"}, "secrets": {"HF_TOKEN": None}}
    assert rendered(tmp_path, "envs: {T: null}\nrun: x\n", secret={"T": None}) == {"run": "x", "secrets": {"T": None}}
    with pytest.raises(UsageError, match=r"own.yaml, line 3: WHERE in `envs` has no value"):
        rendered(tmp_path, text, secret={"HF_TOKEN": None})


def test_options_edit_yaml_of_every_style(tmp_path: Path) -> None:
    options = {"name": "r", "env": {"A": "1"}, "gpus": "L4:8", "num_nodes": 2, "max_hourly_cost": 3.5}
    for text in [
        "{}",
        "{run: x}",
        '{"run": "x", "resources": null, "envs": {"B": "2"}}',
        "run: x\nresources:\nenvs: # none\n",
        "run: x\r\nname:\r\nnum_nodes: 1\r\n",
        "run: x\nresources: &r\n  gpus: T4\n  # said\nenvs: {B: 2,}\n...\n",
        "\ufeffrun: x\nresources: {cpus: 2}",
    ]:
        made = rendered(tmp_path, text, strategy="failover", **options)
        assert (made["name"], made["num_nodes"], made["envs"]["A"]) == ("r", 2, "1"), text
        assert made["resources"]["accelerators"] == "L4:8"
        assert made["resources"]["max_hourly_cost"] == 3.5
        assert made["resources"]["job_recovery"] == {"strategy": "FAILOVER"}
        assert "gpus" not in made["resources"]


# -- anything at all ---------------------------------------------------------------------------------------------------

VALUES: dict[str, list[object]] = {
    "spot_recovery": ["failover", "EAGER_NEXT_REGION", "none", "NONE", None],
    "job_recovery": ["FAILOVER", {"strategy": "failover"}, {"recover_on_exit_codes": [3, 4]}, {"strategy": "none"}, 7],
    "gpus": ["A100:8", {"L4": 1}],
    "accelerators": ["A100:8", ["L4", "T4"]],
    "max_price": [3, 2.5, "$3/h", "4.0"],
    "infra": ["aws", "aws/us-east-1", "*/us-east-1", "k8s/a/b", None],
    "cloud": ["aws", "AWS", "gcp", "kubernetes", None],
    "region": ["us-east-1", "é", None],
    "zone": ["us-east-1a", "a b"],
    "use_spot": [True, "true", "No", "maybe"],
    "disk_size": [100, "100GB"],
    "labels": [{"a: b": "#c"}, {"spot_recovery": "yes"}, {}],
    "image_id": ["docker:x y", "multi\nline\n", None],
}
UNTOUCHED = ("disk_size", "labels", "image_id")
RUNS = ["x", "python -m trainer", "a\n# python -m trainer\n", "cd /x && exec ~/skyspot/python -m trainer.launch y\n"]


def some(keys: dict[str, list[object]]) -> st.SearchStrategy[dict[str, object]]:
    """A few of the keys in any order, each with one of its values. The same objects: PyYAML makes aliases of them."""
    chosen = st.lists(st.sampled_from(sorted(keys)), unique=True, max_size=6)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: st.sampled_from(keys[name]) for name in names}))


RUNG_LISTS = st.lists(st.one_of(some(VALUES), st.just({"cpus": 2})), min_size=1, max_size=4)
RESOURCE_BLOCKS = st.builds(
    lambda top, at, rungs, again: {**top, **({at: [*rungs, *([rungs[0]] if again else [])]} if at else {})},
    some(VALUES),
    st.sampled_from(["", "ordered", "any_of"]),
    RUNG_LISTS,
    st.booleans(),
)


def written(document: dict, flow: bool | None, width: int, noise: list[str], ending: str) -> str:
    """The document as somebody may have written it, with comments and blank lines between."""
    text = yaml.safe_dump(document, default_flow_style=flow, width=width, sort_keys=False, allow_unicode=True)
    lines = text.splitlines()
    if not flow and '"' not in text and "'" not in text:
        for index, extra in enumerate(noise):
            lines.insert(index * 3 % (len(lines) + 1), extra)
    return ending.join(lines) + ending * (len(noise) % 2)


@pytest.mark.slow
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    RESOURCE_BLOCKS,
    st.sampled_from(RUNS),
    st.sampled_from([None, True, False]),
    st.sampled_from([20, 1000]),
    st.lists(st.sampled_from(["# said", "", "      # far"]), max_size=5),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_resources_come_out_as_yaml_that_needs_nothing_more(resources, run, flow, width, noise, ending) -> None:
    document = {"name": "é", "envs": {"use_spot": "true", "A": "b"}, "resources": resources, "run": run}
    check_all_but_the_spelling(written(document, flow, width, noise, ending))


def check_all_but_the_spelling(text: str) -> None:
    """A text is refused in a line, or all of it means what it meant, in today's words."""
    before = yaml.safe_load(text)
    try:
        made = to_today(text)
    except UsageError as refused:
        assert "line" in str(refused)
        assert "\n" not in str(refused)
        return
    assert to_today(made.text) == Migrated(made.text, ())
    assert (made.text == text) == (not made.changes)
    after = yaml.safe_load(made.text)
    assert {**after, "resources": None} == {**before, "resources": None}
    old, new = places(before), places(after)
    assert [untouched(place) for place in old] == [untouched(place) for place in new]
    for was, now in zip(old, new, strict=True):
        assert not {"spot_recovery", "gpus", "max_price"} & set(now)
        # A rung's own `gpus` counts before `accelerators` that `<<` merges into it.
        assert now.get("accelerators") in [was[key] for key in ("accelerators", "gpus") if key in was] or [None]
        assert now.get("use_spot") not in ("true", "No")
    for rung in new[1:] or new:
        asked = {key for key, value in {**new[0], **rung}.items() if value is not None}
        assert "infra" not in asked or not asked & {"cloud", "region", "zone"}
    if "trainer" not in before["run"]:
        assert made.text.count("75") == text.count("75")
    if not any(isinstance(place.get("job_recovery"), dict) for place in old):  # what is said inside it goes with it
        assert comments(text) == comments(made.text)


def places(document: dict) -> list[dict]:
    resources = document.get("resources") or {}
    return [resources, *resources.get("ordered", []), *resources.get("any_of", [])]


def untouched(place: dict) -> dict:
    return {key: place[key] for key in UNTOUCHED if key in place}


def comments(text: str) -> int:
    return text.count("# said") + text.count("# far")


PIECES = [
    "resources:", "  resources:", "ordered:", "  any_of:", "- ", "  - ", "    - ", "{", "}", "[", "]", ",", ": ", "\n",
    "\n  ", "\n    ", "\r\n", " # c\n", "spot_recovery: ", "job_recovery: ", "gpus: ", "infra: aws", "cloud: aws",
    "region: r", "use_spot: 'true'", "max_price: 3", "&a ", "*a", "<<: *a", "!!str ", "!!set ", "!!bool x", "? ", "|\n",
    "strategy: none", "envs:", "null", "experimental:", "config_overrides:", "run: python -m trainer\n", "...\n",
    "--- ", "\ufeff", "\t", "é", '"', "'", "\u2028", "recover_on_exit_codes: ", "3",
]  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_whatever_the_file_holds_it_is_migrated_or_refused_in_a_line(text: str) -> None:
    try:
        made = to_today(text)
    except UsageError as refused:
        assert "\n" not in str(refused)
        return
    assert to_today(made.text) == Migrated(made.text, ())


ANCHORS = "name: &yes 'true'\nenvs: {A: &none none, B: &aws aws, C: &l4 'L4:8'}\n"
ENTRIES = [
    "spot_recovery: failover", "spot_recovery: *none", "spot_recovery: NONE", "job_recovery: {strategy: *none}",
    "job_recovery:\n+  strategy: failover\n+  recover_on_exit_codes:\n+    - 3", "job_recovery: failover",
    "infra: aws", "infra: *aws", 'infra: "*/us-east-1"', "infra: k8s/a", "cloud: aws", "cloud: gcp", "cloud: *aws",
    "region: us-east-1", "region: *aws", "zone: z", "use_spot: *yes", 'use_spot: "no"', "use_spot: !!str on",
    "gpus: *l4", "gpus: {A100: 8}", "accelerators: *l4", "max_price: 3", "max_price: $3.5/h", "disk_size: 100",
    "labels:\n+  spot_recovery: x",
]  # fmt: skip
BLOCKS = st.lists(st.sampled_from(ENTRIES), max_size=5, unique_by=lambda line: line.split(":")[0])
RUNG = st.tuples(BLOCKS, st.sampled_from(["", "", "<<: *r"]), st.sampled_from(["block", "block", "flow", "alias"]))


def rung_text(number: int, lines: list[str], merge: str, style: str, said: str) -> str:
    """An item of `ordered`; the first one has an anchor, which others merge or repeat."""
    if number and style == "alias":
        return "    - *r\n"
    lines = [*([merge] if number and merge else []), *lines]
    anchor = "" if number else "&r "
    if style == "flow" or not lines:
        return f"    - {anchor}{{{', '.join(line for line in lines if '+' not in line)}}}{said}\n"
    block = f"{said}\n      ".join(line.replace("+", "      ") for line in lines)
    return f"    - {anchor.strip()}\n      {block}{said}\n" if anchor else f"    - {block}{said}\n"


@settings(deadline=None, max_examples=100)
@given(
    BLOCKS,
    st.lists(RUNG, max_size=4),
    st.booleans(),
    st.sampled_from(["", "  # said"]),
    st.sampled_from(["run: x\n", "run: python -m trainer"]),
)
def test_anchors_aliases_and_merge_keys_come_out_right_or_are_refused(top, rungs, first, said, run) -> None:
    block = "".join(f"  {line.replace('+', '  ')}{said}\n" for line in top)
    items = "".join(rung_text(number, *rung, said) for number, rung in enumerate(rungs))
    ordered = f"  ordered:{said}\n{items}" if items else ""
    resources = f"resources:\n{ordered}{block}" if first else f"resources:\n{block}{ordered}"
    check_all_but_the_spelling(f"{ANCHORS}{resources if top or rungs else ''}{run}")
