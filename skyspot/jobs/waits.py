"""SkyPilot's record of a run's launches: how long each attempt waited for its machine, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skyspot.errors import SkyspotError, in_a_line
from skyspot.jobs import client
from skyspot.money.attempts import Life
from skyspot.money.waiting import CLOCKS, JobTask, StatusChange, Wait, job_of_launch, launches, waits_by_skypilot
from skyspot.runs import workers

ASK_S = 30.0
"""Longest wait for SkyPilot's record of one job."""
MAX_JOBS = 10
"""SkyPilot is asked for the newest launches of a run."""


@dataclass(frozen=True)
class Known:
    """What SkyPilot's server knows of a run."""

    waits: dict[str, Wait]
    """By attempt's name."""
    asked_for: frozenset[str]
    """The attempts after which came a recovery that is none from a preemption."""
    notes: tuple[str, ...]


def ask_skypilot(lives: Sequence[Life]) -> Known:
    """What SkyPilot's server knows of the attempts; a server that does not answer is a note.

    Asks nobody if no attempt was part of a managed job.
    """
    waits: dict[str, Wait] = {}
    asked_for: set[str] = set()
    notes: list[str] = []
    jobs = [(launch, job, own) for launch, own in launches(lives).items() if (job := job_of_launch(launch))]
    for launch, job, own in jobs[-MAX_JOBS:]:
        try:
            changes = workers.call_in_thread("SkyPilot's server", _events, launch, job, seconds=ASK_S)
        except SkyspotError as error:
            notes.append(f"Waiting is taken from {CLOCKS}: {in_a_line(error).rstrip('.')}.")
            break
        found, others, note = waits_by_skypilot(own, changes)
        waits |= found
        asked_for |= others
        notes += [note] if note else []
    return Known(waits, frozenset(asked_for), tuple(notes))


def _events(launch: str, job: JobTask) -> list[StatusChange]:
    """A job's record, if it is the launch's job: another server numbers its jobs from 1, too."""
    found = client.queue([job.job_id], start=False)
    if not any(one.id == job.job_id and f"_{one.name}_" in launch for one in found):
        raise SkyspotError(f"SkyPilot's server does not know job {job.job_id} of this run")
    return client.job_events(job.job_id, job.task)
