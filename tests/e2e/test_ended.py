"""How jobs end that are not preempted: cancelled, failed, crashing again and again; and what the user sees of it."""

from __future__ import annotations

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Lab, call, kill, processes_of, train_here, until
from managed import ENDED, PATIENCE_S, Job, launch, newest
from place import CLOSING, CLUSTER, MOUNTS, ON_DEMAND, REPO, S3_DATA, SPOT
from scenarios import scenario
from test_preempted import Ended, template_options, undisturbed, verdict  # noqa: F401  (a fixture)

from skyspot.rehearsal.verdict import read_history
from trainer.layout.names import RunPaths

TASK = """\
resources:
  infra: slurm/{cluster}/{spot}
  cpus: 1
  job_recovery: {{strategy: FAILOVER, recover_on_exit_codes: [75]}}
num_nodes: {nodes}
envs:
  SKYSPOT_CHECKPOINT_DIR: {folder}
  OMP_NUM_THREADS: "1"
file_mounts:
  ~/skyspot/trainer: {trainer}
  ~/program.py: {program}
setup: |
  set -e
  bash ~/skyspot/trainer/setup.sh
run: |
  cd ~/skyspot
  export PYTHONPATH=~/skyspot
  exec ~/skyspot/python -m trainer.launch --processes 1 ~/program.py {arguments}
"""


def launch_program(lab: Lab, name: str, program: Path, arguments: str = "", nodes: int = 1) -> Job:
    """Submit a program of the user's own under our launcher, as a plain task YAML."""
    here = lab.project / name
    shutil.copytree(REPO / "trainer", here / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(program, here / "program.py")
    task = here / "task.yaml"
    task.write_text(
        TASK.format(cluster=CLUSTER, spot=SPOT, nodes=nodes, folder=lab.shared / name, trainer=here / "trainer",
                    program=here / "program.py", arguments=arguments)
    )  # fmt: skip
    return launch(lab, name, task=str(task), infra=None, bucket=None)


def failed(lab: Lab, name: str, source: str) -> Ended:
    """A program of a few lines, until SkyPilot has given its job up."""
    program = lab.project / f"{name}.py"
    program.write_text(source)
    job = launch_program(lab, name, program)
    return Ended(job, job.wait("FAILED", seconds=4 * PATIENCE_S), job.recoveries)  # Of up to four machines.


# -- what the user sees ------------------------------------------------------------------------------------------------


LONG = {"max_steps": 1200, "global_batch_size": 4, "micro_batch_size": 4, "seq_len": 64}
"""Steps enough, and long enough, for a person to look at the job from all sides while it runs."""


@dataclass(frozen=True)
class Watched:
    job: Job
    partition: str
    queue: list[dict[str, Any]]
    table: str
    sky_queue: str
    log: str
    refused: str
    cancelled: str
    end: dict[str, Any]
    resumed: Ended
    relaunched: str


@scenario
def cancelled(lab: Lab) -> Watched:
    """Its first rung's partition is DOWN. Looked at while it runs, then cancelled; and launched again under its name.

    DOWN from the start: on recovery SkyPilot's FAILOVER first asks for the cluster that it had, whatever its partition.
    It is UP again for the second launch, or SkyPilot would wait for that rung once more.
    """
    lab.partition(CLOSING, "DOWN")
    ladder = ["--prefer", f"slurm/{CLUSTER}/{CLOSING}", "--prefer", f"slurm/{CLUSTER}/{ON_DEMAND}"]
    job = launch(lab, "cancelled", *ladder, *template_options(**LONG), infra=f"slurm/{CLUSTER}")
    job.wait_committed(30)
    job.wait("RUNNING")  # For SkyPilot, it is STARTING for some seconds more.
    partition = job.allocation()[1]
    with ThreadPoolExecutor() as at_once:
        queue = at_once.submit(lab.skyspot, "queue", "--json")
        table = at_once.submit(lab.skyspot, "queue")
        sky_queue = at_once.submit(lab.sky, "jobs", "queue")
        log = at_once.submit(lab.skyspot, "logs", "cancelled", "--no-follow")
        refused = at_once.submit(lab.skyspot, "launch", "-n", "cancelled", "-y", "-d", check=False)
    lab.note("cancelled: looked at from all sides")
    done = lab.skyspot("cancel", "cancelled")
    lab.note("cancelled: cancel came back")
    job.wait("CANCELLED")
    end = job.events()["end"]
    lab.partition(CLOSING, "UP")
    again = lab.skyspot("launch", "-n", "cancelled", "-y", "-d")
    later = Job(lab, "cancelled", until("the second job", lambda: _newer(lab, job), PATIENCE_S), job.run)
    status = later.wait("SUCCEEDED")
    return Watched(
        job, partition, json.loads(queue.result().stdout), table.result().stdout, sky_queue.result().stdout,
        log.result().stdout, refused.result().stderr, done.stdout + done.stderr, end,
        Ended(later, status, later.recoveries), again.stdout + again.stderr,
    )  # fmt: skip


def _newer(lab: Lab, job: Job) -> int | None:
    found = newest(lab, job.name)
    return found if found is not None and found > job.id else None


def test_a_partition_that_is_down_sends_the_run_to_the_next_rung(cancelled: Watched) -> None:
    assert cancelled.partition == ON_DEMAND
    assert cancelled.job.recoveries == 0


def test_the_queue_shows_the_training_beside_the_job(cancelled: Watched) -> None:
    row = next(row for row in cancelled.queue if row["id"] == cancelled.job.id)
    assert (row["name"], row["status"], row["attempts"]) == ("cancelled", "RUNNING", 1)
    assert row["step"] >= 30
    assert row["max_steps"] == LONG["max_steps"]
    assert row["committed_step"] >= 30
    assert 0 < row["loss"] < 7
    assert f"/{LONG['max_steps']}" in cancelled.table
    assert "cancelled" in cancelled.sky_queue
    assert "RUNNING" in cancelled.sky_queue


def test_the_log_is_the_trainers(cancelled: Watched) -> None:
    assert f"step 1/{LONG['max_steps']}" in cancelled.log


def test_a_living_job_of_the_name_is_not_joined_by_a_second(cancelled: Watched) -> None:
    assert f"job {cancelled.job.id} named cancelled is active (RUNNING)" in cancelled.refused
    assert "skyspot logs cancelled" in cancelled.refused


def test_a_cancelled_run_saves_first_and_goes_on_under_its_name(cancelled: Watched) -> None:
    assert "saved and stopped" in cancelled.cancelled
    assert (cancelled.end["code"], cancelled.end["cause"]) == (79, "stop-request")
    assert cancelled.end["step"] == cancelled.end["committed_step"]
    assert f"Resumes:     cancelled from step {cancelled.end['step']}, after 1 attempt" in cancelled.relaunched
    restored = cancelled.resumed.job.events()["restored"]
    assert (restored["step"], restored["lost_steps"]) == (cancelled.end["step"], 0)
    history = read_history(cancelled.job.run)
    assert history
    assert sorted(history.lines) == list(range(1, LONG["max_steps"] + 1))


def test_a_finished_run_is_not_submitted_again(cancelled: Watched, lab: Lab) -> None:
    done = lab.skyspot("launch", "-n", "cancelled", "-y")
    assert "Run cancelled is finished" in done.stdout
    assert newest(lab, "cancelled") == cancelled.resumed.job.id


# -- failures ----------------------------------------------------------------------------------------------------------


@scenario
def crashing(lab: Lab) -> Ended:
    """It leaves with 75 before anything is committed, every time."""
    return failed(lab, "crashing", "import sys\nprint('crashing', flush=True)\nsys.exit(75)\n")


def test_a_crash_loop_is_stopped_after_three_attempts(crashing: Ended) -> None:
    codes = [crashing.job.events(index)["end"]["code"] for index in range(len(crashing.job.attempts()))]
    assert codes == [75, 75, 75, 80]
    assert "no progress: 3 attempts in a row" in crashing.job.log()


# -- two nodes ---------------------------------------------------------------------------------------------------------

MLP = REPO / "tests" / "programs" / "mlp.py"
PROGRAM = "--dir $SKYSPOT_CHECKPOINT_DIR --steps 1200 --save-every 20"


@scenario
def two_nodes(lab: Lab) -> tuple[Path, Ended]:
    """Two processes, undisturbed and without SkyPilot; and two nodes, of which the second loses its machine."""
    whole = lab.shared / "two-undisturbed"
    here = lab.project / "two.py"
    shutil.copy(MLP, here)
    train_here("trainer.launch", "--processes", 2, here, "--dir", whole, *PROGRAM.split()[2:])
    broken = launch_program(lab, "two-nodes", MLP, PROGRAM, nodes=2)
    broken.wait_committed(100)
    # The machine of the second node goes, and with it the allocation, as a cloud takes it.
    number, _, _ = broken.allocation()
    second = [pid for pid in processes_of(number) if _is_rank(pid, 1)]
    assert second, broken.story()
    kill(second, signal.SIGKILL)
    call("scancel", number)
    broken.lab.note(f"two-nodes: {len(second)} processes of the second node killed, its allocation gone")
    return whole, Ended(broken, broken.wait("SUCCEEDED"), broken.recoveries)


def _is_rank(pid: int, node: int) -> bool:
    """Whether a process is a rank or the launcher of our job on a node."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return (
        f"SKYPILOT_NODE_RANK={node}".encode() in words and b"program.py" in line and b"python" in line.split(b"\0")[0]
    )


def test_two_nodes_of_which_one_is_lost_come_out_as_two_undisturbed_ones(two_nodes: tuple[Path, Ended]) -> None:
    whole, broken = two_nodes
    assert broken.recoveries == 1
    assert len(broken.job.attempts()) == 2
    assert broken.job.events(0)["end"]["code"] == 75
    found = verdict(whole, broken.job)
    assert found.exact, found.text


# -- a bucket ----------------------------------------------------------------------------------------------------------


@scenario
def in_a_bucket(lab: Lab) -> Ended:
    """Checkpoints on an S3 MOUNT; the task is edited by hand to name the lab's own store, and used as it is."""
    name, options = "in-a-bucket", ["--infra", f"slurm/{CLUSTER}/{SPOT}", "--env", "OMP_NUM_THREADS=1"]
    mount = MOUNTS / name
    arguments = ["finetune", "-n", name, *options, "--bucket", "skyspot-lab", *template_options()]
    lab.skyspot("render", *arguments, "-o", ".")
    written = lab.project / ".skyspot" / f"{name}.yaml"
    text = written.read_text().replace('name: "skyspot-lab"', 'name: "skyspot-lab", store: vastdata')
    written.write_text(text.replace("/checkpoints", str(mount)))
    done = lab.skyspot("launch", *arguments, "-y", "-d")
    assert f"Using .skyspot/{name}.yaml with your edits" in done.stderr
    store = RunPaths(S3_DATA / "skyspot-lab" / name)
    job = Job(lab, name, until("it is in the queue", lambda: newest(lab, name), PATIENCE_S), store)
    job.wait_committed(20)
    job.scancel()
    job.wait_attempts(2)
    status = job.wait("SUCCEEDED")
    until("the model is in the store", (store.final / "MANIFEST.json").exists, PATIENCE_S)
    return Ended(job, status, job.recoveries)


def test_checkpoints_on_an_s3_mount_survive_too(in_a_bucket: Ended, undisturbed: Path) -> None:  # noqa: F811
    assert in_a_bucket.recoveries == 1
    assert in_a_bucket.job.events()["restored"]["step"] >= 20
    found = verdict(undisturbed, in_a_bucket.job)
    assert found.exact, found.text


# -- a pipeline --------------------------------------------------------------------------------------------------------

PIPELINE = """\
name: pipeline
---
name: prepare
resources: {{infra: slurm/{cluster}/{spot}, cpus: 1}}
envs: {{OUT: {out}}}
run: |
  mkdir $OUT
  echo prepared > $OUT/data
  until [ -e $OUT/prepare-was-seen ]; do sleep 0.5; done
---
name: train
resources: {{infra: slurm/{cluster}/{spot}, cpus: 1}}
envs: {{OUT: {out}}}
run: |
  cp $OUT/data $OUT/model
  until [ -e $OUT/train-was-seen ]; do sleep 0.5; done
"""


@dataclass(frozen=True)
class Pipeline:
    job: Job
    rows: dict[str, dict[str, Any]]
    """What `skyspot queue` says while each task runs."""
    ends: dict[str, str]
    """SkyPilot's status of each task, at the end."""


@scenario
def pipeline(lab: Lab) -> Pipeline:
    """Two tasks, one after the other; each goes on until it was seen in the queue."""
    out, task = lab.shared / "pipeline", lab.project / "pipeline.yaml"
    task.write_text(PIPELINE.format(cluster=CLUSTER, spot=SPOT, out=out))
    job = launch(lab, "pipeline", task=str(task), infra=None, bucket=None)
    rows = {}
    for name, made in (("prepare", "data"), ("train", "model")):
        until(f"{name} runs", (out / made).exists, PATIENCE_S, job.story)
        rows[name] = until(f"{name} is RUNNING in the queue", lambda: _running_row(lab, job), PATIENCE_S, job.story)
        (out / f"{name}-was-seen").touch()
        lab.note(f"pipeline: {name} was seen")
    ends = until("both tasks have ended", lambda: _ends(lab, job), PATIENCE_S, job.story)
    lab.note(f"pipeline: {ends}")
    return Pipeline(job, rows, ends)


def _running_row(lab: Lab, job: Job) -> dict[str, Any] | None:
    found = json.loads(lab.skyspot("queue", "--json").stdout)
    return next((row for row in found if row["id"] == job.id and row["status"] == "RUNNING"), None)


def _ends(lab: Lab, job: Job) -> dict[str, str] | None:
    tasks = {one["task_name"]: one["status"] for one in lab.queue() if one["job_id"] == job.id}
    return tasks if set(tasks.values()) <= ENDED else None


def test_a_pipelines_tasks_run_one_after_the_other_and_the_queue_shows_each(pipeline: Pipeline, lab: Lab) -> None:
    seen = [(row["task"], row["task_number"], row["tasks"]) for row in pipeline.rows.values()]
    assert seen == [("prepare", 1, 2), ("train", 2, 2)]
    assert pipeline.ends == {"prepare": "SUCCEEDED", "train": "SUCCEEDED"}
    assert (lab.shared / "pipeline" / "model").read_text() == "prepared\n"
    [row] = [row for row in json.loads(lab.skyspot("queue", "--all", "--json").stdout) if row["id"] == pipeline.job.id]
    assert (row["name"], row["task"], row["status"]) == ("pipeline", "train", "SUCCEEDED")


# -- bugs --------------------------------------------------------------------------------------------------------------


@scenario
def failing(lab: Lab) -> Ended:
    """A bug: an exception, which SkyPilot must not retry."""
    return failed(lab, "failing", "print('failing', flush=True)\nraise ValueError('a bug of its own')\n")


def test_an_exception_fails_the_job_and_is_not_retried(failing: Ended, lab: Lab) -> None:
    assert failing.recoveries == 0
    assert len(failing.job.attempts()) == 1
    assert failing.job.events()["end"]["code"] == 1
    assert "a bug of its own" in failing.job.log()
    table = lab.skyspot("queue", "--all").stdout
    assert "FAILED" in table


BROKEN = """\
import itertools
import os

calls = itertools.count()


def broken_loss(model, batch, loss=loss):
    if os.environ["RANK"] == "1" and next(calls) == 80:
        raise ValueError("a bug of the program's own")
    return loss(model, batch)


loss = broken_loss

"""


@scenario
def failing_on_the_second(lab: Lab) -> Ended:
    """An exception on the second of two nodes only, about 40 steps after the start."""
    before, main, after = MLP.read_text().partition('if __name__ == "__main__":')
    assert main
    program = lab.project / "failing-on-the-second.py"
    program.write_text(before + BROKEN + main + after)
    job = launch_program(lab, "failing-on-the-second", program, PROGRAM, nodes=2)
    return Ended(job, job.wait("FAILED"), job.recoveries)


def test_an_exception_on_the_second_node_fails_the_job_and_is_not_retried(failing_on_the_second: Ended) -> None:
    assert failing_on_the_second.recoveries == 0
    assert len(failing_on_the_second.job.attempts()) == 1
    assert failing_on_the_second.job.events()["end"]["code"] == 1
