"""Machines are taken away from managed jobs, and the training comes out as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab import Lab, train_here
from managed import Job, launch
from scenarios import scenario

from skyspot.rehearsal.verdict import Verdict, compare, read_history
from trainer.layout.names import RunPaths

SIZES = {"max_steps": 600, "save_every": 10, "global_batch_size": 2, "micro_batch_size": 2, "seq_len": 32}
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


@scenario
def undisturbed(lab: Lab) -> Path:
    """The same training, without SkyPilot and without a preemption."""
    folder = lab.shared / "undisturbed"
    train_here("trainer", "--checkpoint-dir", folder, "--processes", 1, *trainer_options())
    lab.note("undisturbed: done")
    return folder


@scenario
def killed_twice(lab: Lab) -> Ended:
    job = launch(lab, "killed-twice", *template_options())
    job.wait_committed(20)
    job.scancel()
    job.wait_attempts(2)
    job.wait_committed(job.committed_step() + 50)
    job.power_off()
    status = job.wait("SUCCEEDED")
    return Ended(job, status, job.recoveries)


def verdict(undisturbed: Path, job: Job) -> Verdict:
    reference, history = read_history(RunPaths(undisturbed)), read_history(job.run)
    assert reference
    assert history
    return compare(reference, history)


def test_a_run_whose_allocation_is_taken_twice_is_bit_identical_to_an_undisturbed_one(
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
    assert "end" not in gone
    assert last["end"]["code"] == 0
