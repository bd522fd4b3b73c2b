"""Managed jobs with their training progress, and the job that a name or an ID means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from skyspot.errors import SkyspotError, UnreadableError, UsageError, did_you_mean, in_a_line, shown
from skyspot.jobs import client
from skyspot.jobs.client import Job
from skyspot.runs import location, workers
from skyspot.runs.location import Location
from skyspot.runs.progress import Progress, run_progress
from skyspot.task import document
from skyspot.task.options import written_task
from trainer.layout.names import RunPaths

READ_S = 20.0
"""Longest wait for all buckets, and then for SkyPilot's reasons."""
LISTING_S = 60.0
"""Longest wait for SkyPilot's list of its buckets; SkyPilot may have to start its server first."""
READERS = 32
MAX_REASONS = 5
"""Jobs for which SkyPilot is asked why they have no machine."""
_T = TypeVar("_T")
_NO_MACHINE = ("PENDING", "STARTING", "RECOVERING")


@dataclass(frozen=True)
class TrackedJob:
    """A job with the progress of its run."""

    job: Job
    progress: Progress | None
    unread: str
    """The reason why there is no progress to show; empty if there is."""
    waits_for: str = ""
    """The reason why a starting job has no machine yet."""


def track(jobs: Sequence[Job]) -> list[TrackedJob]:
    """Each job with its progress, and why a starting job has no machine yet."""
    found = workers.run_all([partial(_track, job) for job in jobs], READ_S, READERS)
    tracked = [
        one or TrackedJob(job, None, f"its bucket did not answer within {READ_S:.0f} s")
        for job, one in zip(jobs, found, strict=True)
    ]
    starting = [number for number, one in enumerate(tracked) if one.job.status in _NO_MACHINE][:MAX_REASONS]
    reasons = workers.run_all([partial(_reason, tracked[number].job) for number in starting], READ_S, 1)
    for number, reason in zip(starting, reasons, strict=True):
        waits_for = reason or tracked[number].job.details or "SkyPilot has not reported a reason yet"
        tracked[number] = replace(tracked[number], waits_for=waits_for)
    return tracked


def _track(job: Job) -> TrackedJob:
    try:
        progress = run_progress(open_job(job))
    except Exception as error:  # The other rows are shown whatever happens to this one.
        return TrackedJob(job, None, in_a_line(error))
    return TrackedJob(job, progress, "" if progress else "its run folder is empty")


def _reason(job: Job) -> str | None:
    with suppress(Exception):
        return client.last_refusal(job.id)
    return None


def open_job(job: Job) -> RunPaths:
    """The folder of a job's run.

    Raises:
        UnreadableError: the folder cannot be read from this machine, or the task does not name it.
    """
    where = _location(job.task, job) or _written(job)
    if where is None:
        raise UnreadableError("its task sets no SKYSPOT_CHECKPOINT_DIR")
    return location.open_run(resolved(where))


def _written(job: Job) -> Location | None:
    """The run's location in the task YAML that skyspot wrote for a job."""
    with suppress(OSError, UnicodeDecodeError):
        return _location(written_task(job.name).read_text(encoding="utf-8"), job)
    return None


def _location(text: str, job: Job) -> Location | None:
    """The location of the run of a job's current task."""
    tasks = document.tasks(text)
    return location.of_task(tasks[job.part]) if job.part < len(tasks) else None


def resolved(where: Location) -> Location:
    """A location with the URL of its bucket; SkyPilot knows the URL of a bucket that it created.

    Raises:
        UnreadableError: SkyPilot cannot list its buckets, or does not answer.
    """
    if where.url is None and where.made is not None:
        try:
            url = workers.call_in_thread("its list of buckets", client.bucket_url, where.made, seconds=LISTING_S)
        except SkyspotError as error:
            raise UnreadableError(f"SkyPilot cannot locate its bucket {where.made} ({error})") from error
        return Location(where.inside, url, where.made)
    return where


def pick(jobs: Sequence[Job], target: str, confirm: Callable[[str], bool] | None) -> Job:
    """The job that a name or an ID means: the only active job of that name, or the newest.

    Args:
        jobs: All managed jobs, newest first.
        target: A name or an ID.
        confirm: Asks whether the newest of several active jobs is meant; None if there is no terminal.

    Raises:
        UsageError: there is no such job, or several are active and none was chosen.
    """
    found = [job for job in jobs if job.name == target] or [job for job in jobs if str(job.id) == target.lstrip("0")]
    if not found:
        near = did_you_mean(target, [job.name for job in jobs])
        raise UsageError(f"no managed job is named {shown(target)}.{near} `skyspot queue --all` lists all jobs")
    living = [job for job in found if job.living]
    if len(living) <= 1:
        return (living or found)[0]
    newest, ids = living[0], ", ".join(str(job.id) for job in living)
    if confirm is not None and confirm(
        f"{len(living)} jobs named {target} are active ({ids}). Use the newest, {newest.id}?"
    ):
        return newest
    raise UsageError(
        f"{len(living)} jobs named {target} are active ({ids}), the newest is {newest.id}; give the ID instead"
    )
