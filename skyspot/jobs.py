"""Managed jobs with the training beside them: which job is meant, how far it has come, and how it is asked to save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from skyspot import managed_jobs, runs, task
from skyspot.errors import SkyspotError, UsageError, did_you_mean, shown
from skyspot.managed_jobs import Job
from skyspot.runs import Location, Progress, UnreadableError
from trainer.layout import (
    AttemptName,
    LayoutError,
    RunPaths,
    event_named,
    file_safe,
    list_attempts,
    read_events,
    to_json,
)

READ_S = 20.0
WATCH_S = 20.0
LOOK_S = 1.0
STARTING_LOOKS = 5
_NO_MACHINE = ("PENDING", "STARTING", "RECOVERING")


@dataclass(frozen=True)
class Seen:
    """A job, and what its run's folder says."""

    job: Job
    progress: Progress | None
    unread: str
    """Why there is no progress to show; empty where there is."""
    waits_for: str = ""
    """Of a job that is starting: why it has no machine yet."""


def look(jobs: Sequence[Job]) -> list[Seen]:
    """Each job with its training, and why it waits where it has no machine."""
    with ThreadPoolExecutor(8) as pool:
        asked = [(job, pool.submit(_progress, job)) for job in jobs]
        seen = []
        for job, future in asked:
            progress, unread = None, ""
            try:
                progress = future.result(READ_S)
                unread = "" if progress else "nothing written yet"
            except (UnreadableError, LayoutError) as error:
                unread = str(error)
            except TookTooLong:
                unread = f"its bucket gave no answer within {READ_S:.0f} s"
            seen.append(Seen(job, progress, unread))
    starting = [one.job.id for one in seen if one.job.status in _NO_MACHINE][:STARTING_LOOKS]
    return [_with_reason(one) if one.job.id in starting else one for one in seen]


def _progress(job: Job) -> Progress | None:
    return runs.progress(open_job(job))


def _with_reason(seen: Seen) -> Seen:
    why = None
    with suppress(SkyspotError):
        why = managed_jobs.last_refusal(seen.job.id)
    return Seen(seen.job, seen.progress, seen.unread, why or seen.job.details or "SkyPilot has not said why yet")


def open_job(job: Job) -> RunPaths:
    """The run's folder of a job.

    Raises:
        UnreadableError: it cannot be read from here, or the task does not say where it is.
    """
    where = runs.location(_task_of(job))
    if where is None:
        where = _written(job.name)
    if where is None:
        raise UnreadableError("its task names no SKYSPOT_CHECKPOINT_DIR")
    return runs.open_run(resolved(where))


def _task_of(job: Job) -> dict[str, Any]:
    """The task that was submitted. SkyPilot keeps it behind a document of its own that holds the job's name alone."""
    with suppress(yaml.YAMLError):
        for document in yaml.safe_load_all(job.task):
            if isinstance(document, dict) and "envs" in document:
                return document
    return {}


def _written(name: str) -> Location | None:
    with suppress(OSError, UnicodeDecodeError):
        return runs.location(task.load(runs.written_task(name).read_text(encoding="utf-8")))
    return None


def resolved(where: Location) -> Location:
    """A location whose bucket SkyPilot made, with the URL that SkyPilot knows."""
    if where.url is None and where.made is not None:
        return Location(where.inside, managed_jobs.bucket_url(where.made), where.made)
    return where


def pick(jobs: Sequence[Job], target: str, confirm: Callable[[str], bool] | None) -> Job:
    """The job that a name or an id means: the only living one of that name, else the newest.

    Args:
        jobs: All managed jobs, the newest first.
        target: A name or an id.
        confirm: Asks whether the newest of several living ones is meant; None where nobody can be asked.

    Raises:
        UsageError: there is none (the nearest name is given), or several live and nobody said which.
    """
    found = [job for job in jobs if job.name == target] or [
        job for job in jobs if target.isdigit() and job.id == int(target)
    ]
    if not found:
        near = did_you_mean(target, [job.name for job in jobs])
        raise UsageError(f"no managed job is called {shown(target)}.{near} `skyspot queue --all` lists them")
    living = [job for job in found if job.living]
    if len(living) <= 1:
        return (living or found)[0]
    newest, ids = living[0], ", ".join(str(job.id) for job in living)
    if confirm is not None and confirm(
        f"{len(living)} jobs called {target} are alive ({ids}). The newest, {newest.id}?"
    ):
        return newest
    raise UsageError(
        f"{len(living)} jobs called {target} are alive ({ids}), the newest is {newest.id}: give the id instead"
    )


# -- cancel ----------------------------------------------------------------------------------------------------------


def ask_to_save(job: Job, grace_s: float, say: Callable[[str], None]) -> bool:
    """Ask a job's run to save and stop, and wait for it; False where it should be cancelled at once, and says why.

    Nothing here compares clocks: whether the run is alive is told by watching its progress change.
    """
    if job.status != "RUNNING":
        say(f"job {job.id} is {job.status}: nothing is training")
        return False
    try:
        paths = open_job(job)
        with runs.reading(paths):
            attempt = _attempt_of(job, paths)
            if attempt is None:
                say(f"{paths.root}: no attempt of job {job.id} there yet")
                return False
            if ended(paths, attempt):
                return True
            say(f"asking {attempt} to save and stop")
            if not _progresses(paths, attempt):
                say(f"{attempt} shows no progress within {WATCH_S:.0f} s")
                return False
            _request_stop(paths, _launch_of(paths, attempt))
            end = time.monotonic() + grace_s
            while time.monotonic() < end:
                if ended(paths, attempt):
                    say(f"{attempt} saved and stopped")
                    return True
                time.sleep(LOOK_S)
    except (UnreadableError, LayoutError) as error:
        say(f"{error}; SIGTERM will have it save")
        return False
    say(f"{attempt} has not stopped within {grace_s:.0f} s")
    return False


def _attempt_of(job: Job, paths: RunPaths) -> AttemptName | None:
    """The newest attempt, where it is this job's: SkyPilot's task id ends in the job's id and the task's number."""
    attempts = list_attempts(paths)
    if attempts and _launch_of(paths, attempts[-1]).endswith(f"_{job.id}-0"):
        return attempts[-1]
    return None


def _launch_of(paths: RunPaths, attempt: AttemptName) -> str:
    return str((event_named(read_events(paths, attempt), "start") or {}).get("launch", ""))


def ended(paths: RunPaths, attempt: AttemptName) -> bool:
    """Whether an attempt wrote its end."""
    return event_named(read_events(paths, attempt), "end") is not None


def _progresses(paths: RunPaths, attempt: AttemptName) -> bool:
    """Whether the attempt's progress file changes, or its end appears, within the time of watching."""

    def now() -> bytes:
        with suppress(OSError):
            return paths.progress(attempt).read_bytes()
        return b""

    first, end = now(), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        if now() != first or ended(paths, attempt):
            return True
        time.sleep(LOOK_S)
    return False


def _request_stop(paths: RunPaths, launch: str) -> None:
    path = paths.stop(file_safe(launch))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_json({"time": round(time.time(), 3), "why": "skyspot cancel"}))


def await_end(job_id: int, seconds: float) -> bool:
    """Whether a cancelled job has ended within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = managed_jobs.queue([job_id])
        if not found or not found[0].living:
            return True
        time.sleep(2 * LOOK_S)
    return False
