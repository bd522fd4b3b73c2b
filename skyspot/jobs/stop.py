"""Stopping a job: request a save in the run's folder, then wait for the end of the attempt or of the job."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from skyspot.errors import in_a_line
from skyspot.jobs import client
from skyspot.jobs.client import RUNNING, Job
from skyspot.jobs.training import open_job
from skyspot.runs import workers
from skyspot.runs.location import reading
from trainer.layout.documents import to_json
from trainer.layout.events import event_named, read_events
from trainer.layout.names import AttemptName, RunPaths, file_safe, list_attempts

SAVE_S = 90.0
"""The wait for the save, unless the user names another."""
WATCH_S = 20.0
"""The time for which an attempt's progress is watched for a change."""
POLL_S = 1.0
_T = TypeVar("_T")


def request_save(job: Job, grace_s: float, log: Callable[[str], None]) -> bool:
    """Request that a job's run saves and stops, and wait until it has.

    All running tasks of a job group get the request, side by side.

    Args:
        job: The job.
        grace_s: Longest wait for the save.
        log: Gets each line for the user, also the reason for a False.

    Returns:
        Whether the run has saved; otherwise the job should be cancelled immediately.
    """
    tasks = [replace(job, part=part, status=RUNNING) for part in job.beside]
    if job.status == RUNNING:
        tasks.insert(0, job)
    if not tasks:
        log(f"Job {job.id} is {job.status}; no task is training")
        return False
    if len(tasks) == 1:
        return _request_save(tasks[0], grace_s, log)
    longest_s = WATCH_S + grace_s + 5 * workers.TIMEOUT_S
    requests = [partial(_request_save, task, grace_s, log) for task in tasks]
    return all(workers.run_all(requests, longest_s, len(requests)))


def _request_save(job: Job, grace_s: float, log: Callable[[str], None]) -> bool:
    """Request the save from the run of one task, `job.part`.

    No clocks are compared: a run is alive if its progress file changes.
    """
    try:
        paths = open_job(job)
        attempt = _answer(_attempt_of, paths, f"_{job.id}-{job.part}")
        if attempt is None:
            log(f"{paths.root} has no attempt of job {job.id} yet")
            return False
        if _answer(_has_ended, paths, attempt):
            return True
        log(f"Asking {attempt} to save and stop")
        if not _progresses(paths, attempt):
            log(f"{attempt} has made no progress for {WATCH_S:.0f} s")
            return False
        _answer(_request_stop, paths, _answer(_launch_of, paths, attempt))
        end = time.monotonic() + grace_s
        while time.monotonic() < end:
            if _answer(_has_ended, paths, attempt):
                log(f"{attempt} saved and stopped")
                return True
            time.sleep(POLL_S)
    except Exception as error:  # Whatever it is, the job is cancelled.
        log(f"{in_a_line(error)}; cancelling now, the trainer saves when it gets SIGTERM")
        return False
    log(f"{attempt} has not stopped within {grace_s:.0f} s")
    return False


def _answer(function: Callable[..., _T], paths: RunPaths, *args: Any) -> _T:
    """The result of a function that reads a run's folder.

    Raises:
        UnreadableError: the folder cannot be read from this machine, or does not answer.
    """
    result: _T = workers.call(paths.root, _read, function, paths, *args, seconds=workers.TIMEOUT_S)
    return result


def _read(function: Callable[..., _T], paths: RunPaths, *args: Any) -> _T:
    with reading(paths):
        return function(paths, *args)


def _attempt_of(paths: RunPaths, job: str) -> AttemptName | None:
    """The newest attempt if it belongs to this job: SkyPilot's task ID ends in the job's ID and the task's number."""
    attempts = list_attempts(paths)
    if attempts and _launch_of(paths, attempts[-1]).endswith(job):
        return attempts[-1]
    return None


def _launch_of(paths: RunPaths, attempt: AttemptName) -> str:
    return str((event_named(read_events(paths, attempt), "start") or {}).get("launch", ""))


def _has_ended(paths: RunPaths, attempt: AttemptName) -> bool:
    """True if an attempt has written its end event."""
    return event_named(read_events(paths, attempt), "end") is not None


def _progresses(paths: RunPaths, attempt: AttemptName) -> bool:
    """True if the attempt's progress file changes, or its end event appears, within WATCH_S."""
    first, end = _answer(_progress_file, paths, attempt), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        if _answer(_progress_file, paths, attempt) != first or _answer(_has_ended, paths, attempt):
            return True
        time.sleep(POLL_S)
    return False


def _progress_file(paths: RunPaths, attempt: AttemptName) -> bytes:
    with suppress(OSError):
        return paths.progress(attempt).read_bytes()
    return b""


def _request_stop(paths: RunPaths, launch: str) -> None:
    path = paths.stop(file_safe(launch))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_json({"time": round(time.time(), 3), "why": "skyspot cancel"}))


def await_end(job_id: int, seconds: float) -> bool:
    """Wait for a cancelled job to end; returns whether it has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = client.queue([job_id])
        if not found or not found[0].living:
            return True
        time.sleep(2 * POLL_S)
    return False
