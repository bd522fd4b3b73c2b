"""How jobs end that are not preempted: cancelled, failed, crashing again and again; and what the user sees of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Lab, call, kill, processes_of, train_here, until
from managed import ENDED, PATIENCE_S, Job, launch, newest
from place import CLOSING, CLUSTER, ON_DEMAND, REPO, SPOT
from scenarios import scenario
from test_preempted import Ended, template_options, verdict

from skyspot.rehearsal.verdict import read_history

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
  set -- ~/skyspot/python -m trainer.launch --processes 1 ~/program.py {arguments}
  while [ $(ls $SKYSPOT_CHECKPOINT_DIR/attempts 2> /dev/null | wc -l) -lt {again} ]; do "$@"; done
  exec "$@"
"""


def launch_program(lab: Lab, name: str, program: Path, arguments: str = "", nodes: int = 1, again: int = 0) -> Job:
    """Submit a program of the user's own under our launcher, as a plain task YAML.

    Each of the run's first `again` attempts is followed by another one at once, whatever its exit code.
    """
    here = lab.project / name
    shutil.copytree(REPO / "trainer", here / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(program, here / "program.py")
    task = here / "task.yaml"
    task.write_text(
        TASK.format(cluster=CLUSTER, spot=SPOT, nodes=nodes, folder=lab.shared / name, trainer=here / "trainer",
                    program=here / "program.py", arguments=arguments, again=again)
    )  # fmt: skip
    return launch(lab, name, task=str(task), infra=None, bucket=None)


@dataclass(frozen=True)
class Failed:
    job: Job
    recoveries: int
    log: str
    table: str
    """What `skyspot queue --all` says."""


def failed(job: Job) -> Failed:
    """Wait until SkyPilot has given a job up, and look at it then."""
    job.wait("FAILED")
    return Failed(job, job.recoveries, job.log(), job.lab.skyspot("queue", "--all").stdout)


# -- what the user sees ------------------------------------------------------------------------------------------------


LONG = {"max_steps": 800}
"""Steps enough that a person can look at the slowed job from all sides while it runs."""


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
    with job.slowed():
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
def crashing(lab: Lab) -> Failed:
    """It leaves with 75 before anything is committed, every time: three times in its first launch, then once more."""
    program = lab.project / "crashing.py"
    program.write_text("import sys\nprint('crashing', flush=True)\nsys.exit(75)\n")
    return failed(launch_program(lab, "crashing", program, again=2))


def test_a_crash_loop_is_stopped_after_three_attempts(crashing: Failed) -> None:
    codes = [crashing.job.events(index)["end"]["code"] for index in range(len(crashing.job.attempts()))]
    assert codes == [75, 75, 75, 80]
    assert crashing.recoveries == 1
    assert "no progress: 3 attempts in a row" in crashing.log


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
        until(f"{name} is RUNNING", lambda: _tasks(lab, job)[name] == "RUNNING", PATIENCE_S, job.story)  # noqa: B023
        found = json.loads(lab.skyspot("queue", "--json").stdout)
        rows[name] = next(row for row in found if row["id"] == job.id)
        (out / f"{name}-was-seen").touch()
        lab.note(f"pipeline: {name} was seen")
    until("both tasks have ended", lambda: set(_tasks(lab, job).values()) <= ENDED, PATIENCE_S, job.story)
    ends = _tasks(lab, job)
    lab.note(f"pipeline: {ends}")
    return Pipeline(job, rows, ends)


def _tasks(lab: Lab, job: Job) -> dict[str, str]:
    """SkyPilot's status of each task."""
    return {one["task_name"]: one["status"] for one in lab.queue() if one["job_id"] == job.id}


def test_a_pipelines_tasks_run_one_after_the_other_and_the_queue_shows_each(pipeline: Pipeline, lab: Lab) -> None:
    seen = [(row["task"], row["task_number"], row["tasks"]) for row in pipeline.rows.values()]
    assert seen == [("prepare", 1, 2), ("train", 2, 2)]
    assert pipeline.ends == {"prepare": "SUCCEEDED", "train": "SUCCEEDED"}
    assert (lab.shared / "pipeline" / "model").read_text() == "prepared\n"
    [row] = [row for row in json.loads(lab.skyspot("queue", "--all", "--json").stdout) if row["id"] == pipeline.job.id]
    assert (row["name"], row["task"], row["status"]) == ("pipeline", "train", "SUCCEEDED")


# -- bugs --------------------------------------------------------------------------------------------------------------


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
def failing(lab: Lab) -> Failed:
    """A bug, which SkyPilot must not retry: an exception on the second of two nodes only, some 40 steps in."""
    before, main, after = MLP.read_text().partition('if __name__ == "__main__":')
    assert main
    program = lab.project / "failing.py"
    program.write_text(before + BROKEN + main + after)
    return failed(launch_program(lab, "failing", program, PROGRAM, nodes=2))


def test_an_exception_on_the_second_node_fails_the_job_and_is_not_retried(failing: Failed) -> None:
    assert failing.recoveries == 0
    assert len(failing.job.attempts()) == 1
    assert failing.job.events()["end"]["code"] == 1
    assert "a bug of the program's own" in failing.log
    assert re.search(r"\bfailing\b.*\bFAILED\b", failing.table), failing.table
