"""Machines are taken away from managed jobs, and the training comes out as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import Lab, train_here, until
from managed import PATIENCE_S, Job, newest
from place import CLUSTER, MOUNTS, S3_DATA, SPOT
from scenarios import scenario

from skyspot.money.waiting import SKYPILOT
from skyspot.rehearsal.verdict import Verdict, compare, read_history
from trainer.layout.names import RunPaths

SIZES = {"max_steps": 400, "save_every": 10, "global_batch_size": 2, "micro_batch_size": 2, "seq_len": 32}
"""Steps of some 20 ms: long enough to be caught in the middle, short in all."""


def template_options(**more: int) -> list[str]:
    return [text for key, value in {**SIZES, **more}.items() for text in ("--set", f"{key}={value}")]


def trainer_options() -> list[str]:
    return [text for key, value in SIZES.items() for text in (f"--{key.replace('_', '-')}", str(value))]


@dataclass(frozen=True)
class Ended:
    job: Job
    status: str
    recoveries: int
    report: dict[str, Any] = field(default_factory=dict)
    """What `skyspot report --json` says while SkyPilot's server answers."""


@scenario
def undisturbed(lab: Lab) -> Path:
    """The same training, without SkyPilot and without a preemption."""
    folder = lab.shared / "undisturbed"
    train_here("trainer", "--checkpoint-dir", folder, "--processes", 1, *trainer_options())
    lab.note("undisturbed: done")
    return folder


@scenario
def killed_twice(lab: Lab) -> Ended:
    """Checkpoints on an S3 MOUNT; the task is edited by hand to name the lab's own store, and used as it is."""
    name, options = "killed-twice", ["--infra", f"slurm/{CLUSTER}/{SPOT}", "--env", "OMP_NUM_THREADS=1"]
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
    job.wait_committed(job.committed_step() + 50)
    job.power_off()
    lab.unmount(mount)
    status = job.wait("SUCCEEDED")
    until("the model is in the store", (store.final / "MANIFEST.json").exists, PATIENCE_S)
    report = json.loads(lab.skyspot("report", str(store.root), "--json").stdout)
    return Ended(job, status, job.recoveries, report)


def verdict(undisturbed: Path, job: Job) -> Verdict:
    reference, history = read_history(RunPaths(undisturbed)), read_history(job.run)
    assert reference
    assert history
    return compare(reference, history)


def test_a_run_in_a_bucket_that_loses_its_machine_twice_is_bit_identical_to_an_undisturbed_one(
    killed_twice: Ended, undisturbed: Path
) -> None:
    job = killed_twice.job
    assert killed_twice.recoveries == 2
    assert len(job.attempts()) == 3
    found = verdict(undisturbed, job)
    assert found.exact, found.text
    assert found.text == f"bit-identical: {SIZES['max_steps']} of {SIZES['max_steps']} losses, 48 of 48 weights"


def test_a_preempted_allocation_is_saved_and_one_without_notice_goes_back_to_its_last_checkpoint(
    killed_twice: Ended,
) -> None:
    saved, gone, last = (killed_twice.job.events(index) for index in range(3))
    assert saved["end"]["code"] == 75, saved
    assert gone["restored"]["step"] >= 20
    assert "end" not in gone
    assert last["end"]["code"] == 0


def test_the_report_takes_the_waits_for_machines_from_skypilots_record(killed_twice: Ended) -> None:
    report = killed_twice.report
    waits = [one["wait"] for one in report["attempts"]]
    assert [wait["source"] for wait in waits] == [SKYPILOT] * 3, report["notes"]
    assert all(wait["seconds"] > 0 for wait in waits)
    assert all(wait["why"] for wait in waits[1:])
    assert report["preemptions"] == 2
