"""Which job is meant, where its run lies, and what that says: on real run folders, local and in a real S3 server."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import mlp

from skyspot.errors import SkyspotError, UnreadableError, UsageError
from skyspot.jobs import client, launch, stop, training
from skyspot.jobs.client import Job
from skyspot.runs import location
from skyspot.runs.location import Location
from skyspot.runs.progress import run_binding, run_progress
from skyspot.task import document, settings
from trainer.attempt.record import open_attempt
from trainer.layout.names import RunPaths


def job(id: int, name: str = "run-001", status: str = "RUNNING", task: str = "") -> Job:
    return Job(id, name, status, "1x[A100:8]", "aws/us-east-1", 0, 1e9, 60.0, "", task)


# -- where a run lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "mounts", "where"),
    [
        ("/checkpoints/r", {"/checkpoints": {"source": "s3://b", "mode": "MOUNT"}}, Location("r", "s3://b")),
        ("/checkpoints/t/x/r", {"/checkpoints/": {"source": "gs://b/"}}, Location("t/x/r", "gs://b")),
        ("/checkpoints/r", {"/checkpoints": {"name": "n", "mode": "MOUNT"}}, Location("r", None, "n")),
        ("/checkpoints/r", {"/checkpoints": {"name": "n", "store": "s3"}}, Location("r", "s3://n")),
        ("/checkpoints2/r", {"/checkpoints": {"source": "s3://b"}}, Location("/checkpoints2/r", None)),
        ("/c/d/r", {"/c": {"source": "s3://b"}, "/c/d": {"source": "gs://i"}}, Location("r", "gs://i")),
        ("/c/d/r", {"/c/d/": {"source": "gs://i"}, "/c": {"source": "s3://b"}}, Location("r", "gs://i")),
        ("/c/r", {"/c": {"source": "s3://$BUCKET/${TEAM}"}}, Location("r", "s3://mine/a-team")),
        ("/c/r", {"/${WHERE}": {"name": "n-$TEAM", "store": "s3"}}, Location("r", "s3://n-a-team")),
        ("/c/r", {"/c": {"source": "s3://$NOWHERE"}}, Location("r", "s3://$NOWHERE")),
        ("/mnt/efs/r", None, Location("/mnt/efs/r", None)),
        ("relative", None, None),
        (None, {"/checkpoints": {"source": "s3://b"}}, None),
        (["x"], "y", None),
    ],
)
def test_a_runs_place_is_read_from_its_task(folder: object, mounts: object, where: Location | None) -> None:
    envs = {"SKYSPOT_CHECKPOINT_DIR": folder, "BUCKET": "mine", "TEAM": "a-team", "WHERE": "c"}
    (task,) = document.tasks(json.dumps({"envs": envs, "file_mounts": mounts}))
    assert location.of_task(task) == where


def test_a_place_that_is_not_here_is_said_in_a_line(tmp_path: Path) -> None:
    for where, why in (
        (Location(str(tmp_path / "nowhere" / "r"), None), "not on this machine"),
        (Location("r", None, "skyspot-me-1234"), "its store is unknown"),
        (Location("r", "oci://b"), "cannot be read from this machine"),
    ):
        with pytest.raises(UnreadableError, match=why):
            location.open_run(where)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped half-way at SIGTERM, as its bucket holds it."""
    run_dir = tmp_path_factory.mktemp("begun") / "run-001"
    # On a busy machine the default grace may be too short for a save.
    assert mlp(run_dir, "--fault", "sigterm@6", grace=120).code == 75
    return run_dir


def test_progress_is_what_the_newest_attempt_says(begun: Path) -> None:
    found = run_progress(RunPaths(begun))
    assert found
    assert found.attempts == 1
    assert found.step == found.committed_step
    assert found.step >= 6
    assert found.max_steps == 12
    assert isinstance(found.loss, float)
    assert found.committed_at is not None
    assert 0 <= time.time() - found.committed_at < 600
    assert (found.finished, found.cause) == (False, "signal")


def test_a_run_that_nobody_began_has_no_progress(tmp_path: Path) -> None:
    assert run_progress(RunPaths(tmp_path / "r")) is None


def test_a_finished_run_says_so(begun: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run-001"
    shutil.copytree(begun, run_dir)
    assert mlp(run_dir).code == 0
    found = run_progress(RunPaths(run_dir))
    assert found
    assert (found.attempts, found.step, found.finished) == (2, 12, True)


def test_a_runs_progress_is_read_from_its_bucket(begun: Path, bucket: Path) -> None:
    shutil.copytree(begun, bucket / "team" / "run-001")
    paths = location.open_run(Location("team/run-001", "s3://mine"))
    assert run_progress(paths) == run_progress(RunPaths(begun))
    assert run_binding(paths)["model"] == "mlp-32"


def test_a_stop_is_asked_for_in_the_bucket(begun: Path, bucket: Path) -> None:
    shutil.copytree(begun, bucket / "run-001")
    paths = location.open_run(Location("run-001", "s3://mine"))
    stop._request_stop(paths, "sky-managed_run-001_7-0")
    stop._request_stop(paths, "sky-managed_run-001_7-0")
    assert [path.name for path in (bucket / "run-001" / "stop").iterdir()] == ["sky-managed_run-001_7-0.json"]


def test_a_bucket_that_does_not_answer_is_said_in_a_line(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UnreadableError, match="s3://mine/run-001 cannot be read from this machine") as said:
        run_progress(location.open_run(Location("run-001", "s3://mine")))
    assert "\n" not in str(said.value)


# -- which job is meant ------------------------------------------------------------------------------------------------

JOBS = [
    job(9, "twins"), job(8, "twins"), job(7, "twins", "SUCCEEDED"), job(6, "again"), job(5, "again", "CANCELLED"),
    job(4, "over", "FAILED"), job(3, "over", "FAILED_SETUP"), job(2, "7"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "id"), [("again", 6), ("over", 4), ("5", 5), ("8", 8), ("7", 2)], ids=lambda value: str(value)
)
def test_a_name_or_an_id_means_the_living_job(target: str, id: int) -> None:
    assert training.pick(JOBS, target, None).id == id


def test_of_several_living_jobs_the_newest_is_asked_for() -> None:
    asked: list[str] = []
    assert training.pick(JOBS, "twins", lambda question: not asked.append(question)).id == 9
    assert "9, 8" in asked[0]
    for confirm in (None, lambda question: False):
        with pytest.raises(UsageError, match="newest is 9; give the ID"):
            training.pick(JOBS, "twins", confirm)


@pytest.mark.parametrize(
    "target", ["²", "٣", "9" * 5000, "-1", ""], ids=["superscript", "arabic", "long", "sign", "empty"]
)
def test_what_is_no_id_is_refused_in_a_line(target: str) -> None:
    with pytest.raises(UsageError, match="no managed job is named"):
        training.pick([job(3)], target, None)


def test_an_unknown_job_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"no managed job is named 'agian'\. Did you mean 'again'\?"):
        training.pick(JOBS, "agian", None)


@pytest.mark.parametrize(("status", "says"), [("RECOVERING", "no task is training"), ("STARTING", "STARTING")])
def test_a_job_that_does_not_train_is_not_asked_to_save(status: str, says: str) -> None:
    said: list[str] = []
    assert not stop.request_save(job(1, status=status), 1.0, said.append)
    assert says in said[0]


def test_a_run_that_cannot_be_read_is_left_to_sigterm() -> None:
    said: list[str] = []
    task = "envs: {SKYSPOT_CHECKPOINT_DIR: /nowhere/at/all}\nrun: x"
    assert not stop.request_save(job(1, task=task), 1.0, said.append)
    assert "the trainer saves when it gets SIGTERM" in said[0]


MADE = "envs: {SKYSPOT_CHECKPOINT_DIR: /c/r}\nfile_mounts: {/c: {name: mine, mode: MOUNT}}\nrun: x"


@pytest.fixture
def no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyPilot's list of its buckets fails."""

    def fails(name: str) -> str:
        raise SkyspotError("SkyPilot refused: no credentials for gcp")

    monkeypatch.setattr(client, "bucket_url", fails)


@pytest.mark.usefixtures("no_listing")
def test_where_skypilot_cannot_list_its_buckets_the_row_says_so() -> None:
    seen = training.track([job(1, task=MADE), job(2, task="run: x")])
    assert [one.job.id for one in seen] == [1, 2]
    assert "SkyPilot cannot locate its bucket mine (SkyPilot refused: no credentials" in seen[0].unread


@pytest.mark.usefixtures("no_listing")
def test_where_skypilot_cannot_list_its_buckets_cancel_cancels() -> None:
    said: list[str] = []
    assert not stop.request_save(job(1, task=MADE), 1.0, said.append)
    assert "the trainer saves when it gets SIGTERM" in said[0]


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing of one bucket fails in a way that nobody foresaw."""

    def fails(name: str) -> str:
        raise RuntimeError("an odd answer\nin two lines") if name == "mine" else SkyspotError("no such bucket")

    monkeypatch.setattr(client, "bucket_url", fails)


@pytest.mark.usefixtures("odd")
def test_an_odd_error_of_one_row_stands_in_that_row() -> None:
    seen = training.track([job(1, task="run: x"), job(2, task=MADE), job(3, task=MADE.replace("mine", "other"))])
    assert [one.unread for one in seen] == [
        "its task sets no SKYSPOT_CHECKPOINT_DIR",
        "RuntimeError: an odd answer",
        "SkyPilot cannot locate its bucket other (no such bucket)",
    ]


def test_an_odd_error_of_a_reason_leaves_the_rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(id: int) -> str:
        raise RuntimeError("an odd answer")

    monkeypatch.setattr(client, "last_refusal", fails)
    seen = training.track([job(1, status="PENDING", task="run: x"), job(2, task="run: x")])
    assert [one.waits_for for one in seen] == ["SkyPilot has not reported a reason yet", ""]


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("beside", [(), (1,)], ids=["one task", "a group"])
def test_an_odd_error_of_a_run_leaves_it_to_sigterm(beside: tuple[int, ...]) -> None:
    said: list[str] = []
    one = replace(job(1, task=f"{MADE}\n---\n{MADE}"), beside=beside)
    assert not stop.request_save(one, 1.0, said.append)
    assert said == ["RuntimeError: an odd answer; cancelling now, the trainer saves when it gets SIGTERM"] * len(said)
    assert len(said) == 1 + len(beside)


def test_a_jobs_task_that_is_no_yaml_is_said_in_its_row() -> None:
    seen = training.track([job(1, name="x", task="a: !!int nonsense"), job(2, name="x", task="[" * 3000)])
    assert [one.unread for one in seen] == ["its task sets no SKYSPOT_CHECKPOINT_DIR"] * 2


def test_a_job_whose_attempt_is_not_there_yet_is_not_waited_for(begun: Path) -> None:
    said: list[str] = []
    task = f"envs: {{SKYSPOT_CHECKPOINT_DIR: {begun}}}\nrun: x"
    assert not stop.request_save(job(77, task=task), 1.0, said.append)
    assert "no attempt of job 77" in said[0]


# -- what was begun before ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("envs", "run", "field"),
    [
        ({"SKYSPOT_SEED": "7", "SKYSPOT_MAX_STEPS": "12", "SKYSPOT_WEIGHT_DECAY": "0.5"}, "", None),
        ({"SKYSPOT_SEED": "7.0"}, "", None),
        ({"SKYSPOT_SEED": "8"}, "", "seed is 7 in the run and '8' here"),
        ({"SKYSPOT_MODEL": "mlp-64"}, "", "model is 'mlp-32' in the run and 'mlp-64' here"),
        ({"SKYSPOT_MAX_STEPS": "many"}, "", "max_steps is 12 in the run and 'many' here"),
        ({"SKYSPOT_SEED": "8"}, "python -m trainer --allow-config-change seed", None),
        ({"SKYSPOT_SEED": "8"}, "python -m trainer --allow-config-change=seed", None),
        ({"SKYSPOT_SEED": "8"}, "python -m trainer --allow-config-change lr \\\n  --allow-config-change 'seed'", None),
        ({"SKYSPOT_SEED": "8"}, "python -m trainer --allow-config-change  $WHAT", None),
        (
            {"SKYSPOT_SEED": "8"},
            "python -m trainer --allow-config-change seed_of_something",
            "seed is 7 in the run and '8' here",
        ),
        (
            {"SKYSPOT_SEED": "8"},
            "echo --allow-config-change lr  # not --allow-config-change seed",
            "seed is 7 in the run and '8' here",
        ),
    ],
)
def test_another_binding_configuration_is_seen_before_a_machine_is_paid_for(
    begun: Path, envs: dict[str, str], run: str, field: str | None
) -> None:
    (task,) = document.tasks(json.dumps({"envs": {**envs, "WHAT": "seed"}, "run": run}))
    assert launch._difference(task, RunPaths(begun)) == field


@pytest.mark.parametrize(
    ("run", "is_allowed"),
    [
        ("python -m trainer --config conf/train.yaml", True),
        ("exec python -m trainer.launch --processes 2 -m trainer --config=~/sky_workdir/conf/train.yaml", True),
        ("python -m trainer --config conf/one.yaml", True),
        ("python -m trainer --config /etc/train.yaml", True),
        ("python -m trainer --config ~/more/train.yaml", True),
        ("python -m trainer --config conf/train.yaml --allow-config-change lr", False),
        ("python -m trainer --config conf/train.yaml --config conf/none.yaml", False),
        ("python -m trainer --config conf/no-yaml.yaml", False),
        ("python -m trainer --config /bucket/train.yaml", False),
        ("python -m trainer --config /home/train.yaml", False),
        ("python -m trainer --config", False),
        ("python train.py --config conf/train.yaml", False),
    ],
)
def test_what_the_trainers_file_allows_to_change_is_seen_where_the_file_is_here(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, is_allowed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    conf = tmp_path / "code" / "conf"
    conf.mkdir(parents=True)
    (conf / "train.yaml").write_text("lr: 0.1\nallow_config_change: [lr, seed]\n")
    (conf / "one.yaml").write_text("allow-config-change: seed\n")
    (conf / "no-yaml.yaml").write_text("allow_config_change: [seed\n")
    mounts = {"/etc/train.yaml": "code/conf/train.yaml", "~/more": str(conf), "/bucket": "s3://bucket"}
    written = {"envs": {"SKYSPOT_SEED": "8"}, "workdir": "code", "file_mounts": mounts, "run": run}
    (task,) = document.tasks(json.dumps(written))
    assert launch._difference(task, RunPaths(begun)) == (None if is_allowed else "seed is 7 in the run and '8' here")


@pytest.mark.parametrize(
    ("value", "written", "differs"),
    [
        (True, "true", None),
        (True, '"true"', None),
        (True, "True", None),
        (True, '"Yes"', None),
        (True, "on", None),
        (False, "false", None),
        (False, '"no"', None),
        (True, "false", "tied is True in the run and 'False' here"),
        (False, '"yes"', "tied is False in the run and 'yes' here"),
        (False, '""', "tied is False in the run and '' here"),
        (True, "1", "tied is True in the run and '1' here"),
    ],
)
def test_a_boolean_that_binds_may_be_spelled_as_in_yaml(
    tmp_path: Path, value: bool, written: str, differs: str | None
) -> None:
    paths = RunPaths(tmp_path / "run")
    open_attempt(paths, launch="x", config={}, binding={"tied": value})
    (task,) = document.tasks(f"envs: {{SKYSPOT_TIED: {written}}}\nrun: x")
    assert launch._difference(task, paths) == differs


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "bucket: b\n"),
        ("", "bucket: b\n"),
        ("gpus: L4:1  # small", "gpus: L4:1  # small\nbucket: b\n"),
        ("{gpus: L4:1}\n", None),
        ("- x\n", None),
    ],
)
def test_the_bucket_that_skypilot_makes_is_remembered(tmp_path: Path, before: str | None, after: str | None) -> None:
    path = tmp_path / "skyspot.yaml"
    if before is not None:
        path.write_text(before)
    assert settings.remember_bucket("b", tmp_path) == (after is not None)
    assert (path.read_text() if path.exists() else None) == (after if after is not None else before)


# -- SkyPilot ----------------------------------------------------------------------------------------------------------

SURFACE = """
import inspect, json, sys
import sky, sky.jobs
from sky import exceptions
from sky.schemas.api import responses
from sky.server.common import check_server_healthy
from sky.utils import dag_utils
from skyspot.jobs import client as managed_jobs
used = {
    "jobs.launch": (sky.jobs.launch, ["task", "name"]),
    "jobs.queue_v2": (sky.jobs.queue_v2, ["refresh", "skip_finished", "job_ids", "fields"]),
    "jobs.cancel": (sky.jobs.cancel, ["job_ids"]),
    "jobs.tail_logs": (sky.jobs.tail_logs, ["job_id", "follow", "controller", "tail", "output_stream"]),
    "get": (sky.get, ["request_id"]),
    "stream_and_get": (sky.stream_and_get, ["request_id", "output_stream"]),
    "storage_ls": (sky.storage_ls, []),
    "load_dag_from_yaml_str": (dag_utils.load_dag_from_yaml_str, ["yaml_str", "secrets_overrides"]),
    "fill_default_config": (dag_utils.fill_default_config_in_dag_for_job_launch, ["dag"]),
    "check_server_healthy": (check_server_healthy, []),
}
lacking = [f"{name}({part})" for name, (call, parts) in used.items() for part in parts
           if part not in inspect.signature(call).parameters]
lacking += [f"ManagedJobRecord.{field}" for field in managed_jobs.FIELDS
            if field not in responses.ManagedJobRecord.model_fields]
task = "validate_name validate_run expand_and_validate_workdir expand_and_validate_file_mounts resources".split()
lacking += [f"Task.{name}" for name in task if not hasattr(sky.Task("x"), name)]
asked = "validate cloud region zone instance_type ports labels local_disk image_id".split()
lacking += [f"Resources.{name}" for name in asked if not hasattr(sky.Resources(), name)]
records = responses.StorageRecord.model_fields
lacking += [f"StorageRecord.{field}" for field in ("name", "store") if field not in records]
lacking += [f"exceptions.{name}" for name in managed_jobs._REMEDIES if not hasattr(exceptions, name)]
lacking += [f"ManagedJobStatus.{name}" for name in ("RUNNING", "PENDING", "STARTING", "RECOVERING", *managed_jobs.ENDED)
            if name not in sky.jobs.ManagedJobStatus.__members__]
ended = [status.value for status in sky.jobs.ManagedJobStatus
         if status.is_terminal() == managed_jobs.Job(1, "", status.value, "", "", 0, None, None, "", "").living]
print(json.dumps({"version": sky.__version__, "lacking": lacking, "ended": ended}))
"""


@pytest.mark.slow
def test_the_installed_skypilot_has_what_we_use(tmp_path: Path) -> None:
    """An upgrade that breaks us fails here, and says where."""
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SURFACE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lacking"] == []
    assert found["ended"] == []
    client._check_version(found["version"])


def test_the_supported_versions_are_those_of_pyproject() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'"skypilot>={client.SUPPORTED[0]},<{client.SUPPORTED[1]}"' in text


@pytest.mark.parametrize("version", ["0.13.9", "0.15", "0.15.1", "1.0"])
def test_a_version_outside_of_them_is_refused_with_the_remedy(version: str) -> None:
    with pytest.raises(Exception, match=r"pip install 'skypilot>=0\.14\.1,<0\.15'"):
        client._check_version(version)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_one_line_and_whole_where_asked(tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_API_SERVER_ENDPOINT": "http://127.0.0.1:1"}
    for more, lines in ((), 1), (("--verbose",), 10):
        command = [sys.executable, "-m", "skyspot", "queue", *more]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        said = done.stderr.splitlines()
        assert "SkyPilot's API server does not answer. Start it with `sky api start`" in said[-1]
        assert (len(said) == 1) if lines == 1 else (len(said) >= lines), done.stderr


CONTROLLER = """\
I 11-25 10:00:01.123 PID=77 optimizer.py:912] Considered resources (1 node):
\x1b[33mW 11-25 10:00:02 cloud_vm_ray_backend.py:2] \x1b[0mFailed to provision all possible launchable resources.
E 11-25 10:00:03 recovery_strategy.py:300] Failure happened before provisioning. Failover reasons:
sky.exceptions.ResourcesUnavailableError: No launchable resource for 1x <Cloud>({'A100': 8}) in aws/us-east-1.
I 11-25 10:00:04 recovery_strategy.py:310] Retrying to launch the cluster in 60.0 seconds.
"""


def test_the_last_refusal_is_found_in_the_controllers_log() -> None:
    assert client.refusal_in(CONTROLLER) == CONTROLLER.splitlines()[3]
    assert client.refusal_in("I 11-25 10:00:04 x.py:1] all is well\n") is None
