"""Managed jobs with the training beside them: which job is meant, how far it has come, and how it is asked to save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from skyspot.errors import SkyspotError, UnreadableError, UsageError, did_you_mean, shown
from skyspot.jobs import client
from skyspot.jobs.client import RUNNING, Job
from skyspot.runs import aside, location
from skyspot.runs.location import Location, Progress
from skyspot.task import document
from skyspot.task.options import written_task
from trainer.layout.documents import to_json
from trainer.layout.events import event_named, read_events
from trainer.layout.names import AttemptName, RunPaths, file_safe, list_attempts

READ_S = 20.0
"""How long the queue waits for all buckets, and then for SkyPilot's reasons."""
LOOKERS = 32
WATCH_S = 20.0
LOOK_S = 1.0
STARTING_LOOKS = 5
_T = TypeVar("_T")
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
    looked = aside.each([partial(_look, job) for job in jobs], READ_S, LOOKERS)
    seen = [
        one or Seen(job, None, f"its bucket gave no answer within {READ_S:.0f} s")
        for job, one in zip(jobs, looked, strict=True)
    ]
    starting = [number for number, one in enumerate(seen) if one.job.status in _NO_MACHINE][:STARTING_LOOKS]
    asked = aside.each([partial(_reason, seen[number].job) for number in starting], READ_S, 1)
    for number, why in zip(starting, asked, strict=True):
        waits_for = why or seen[number].job.details or "SkyPilot has not said why yet"
        seen[number] = replace(seen[number], waits_for=waits_for)
    return seen


def _look(job: Job) -> Seen:
    try:
        progress = location.progress(open_job(job))
    except SkyspotError as error:
        return Seen(job, None, str(error))
    return Seen(job, progress, "" if progress else "nothing written yet")


def _reason(job: Job) -> str | None:
    with suppress(SkyspotError):
        return client.last_refusal(job.id)
    return None


def open_job(job: Job) -> RunPaths:
    """The run's folder of a job.

    Raises:
        UnreadableError: it cannot be read from here, or the task does not say where it is.
    """
    where = _location(job.task, job) or _written(job)
    if where is None:
        raise UnreadableError("its task names no SKYSPOT_CHECKPOINT_DIR")
    return location.open_run(resolved(where))


def _written(job: Job) -> Location | None:
    """Where the task that was written for a job has its run's folder."""
    with suppress(OSError, UnicodeDecodeError):
        return _location(written_task(job.name).read_text(encoding="utf-8"), job)
    return None


def _location(text: str, job: Job) -> Location | None:
    """Where a task YAML has the run of a job's task that is on."""
    tasks = document.tasks(text)
    return location.location(tasks[job.part]) if job.part < len(tasks) else None


def resolved(where: Location) -> Location:
    """A location whose bucket SkyPilot made, with the URL that SkyPilot knows.

    Raises:
        UnreadableError: SkyPilot does not list its buckets.
    """
    if where.url is None and where.made is not None:
        try:
            url = client.bucket_url(where.made)
        except SkyspotError as error:
            raise UnreadableError(f"SkyPilot does not say where its bucket {where.made} is ({error})") from error
        return Location(where.inside, url, where.made)
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
    found = [job for job in jobs if job.name == target] or [job for job in jobs if str(job.id) == target.lstrip("0")]
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

    All tasks of a job group that are RUNNING are asked, side by side.
    """
    tasks = [replace(job, part=part, status=RUNNING) for part in job.beside]
    if job.status == RUNNING:
        tasks.insert(0, job)
    if not tasks:
        say(f"job {job.id} is {job.status}: nothing is training")
        return False
    if len(tasks) == 1:
        return _ask_task_to_save(tasks[0], grace_s, say)
    longest_s = WATCH_S + grace_s + 5 * aside.ANSWER_S
    asked = [partial(_ask_task_to_save, task, grace_s, say) for task in tasks]
    return all(aside.each(asked, longest_s, len(asked)))


def _ask_task_to_save(job: Job, grace_s: float, say: Callable[[str], None]) -> bool:
    """Ask the run of one task, `job.part`.

    Nothing here compares clocks: whether the run is alive is told by watching its progress change.
    """
    try:
        paths = open_job(job)
        attempt = _asked(_attempt_of, paths, f"_{job.id}-{job.part}")
        if attempt is None:
            say(f"{paths.root}: no attempt of job {job.id} there yet")
            return False
        if _asked(ended, paths, attempt):
            return True
        say(f"asking {attempt} to save and stop")
        if not _progresses(paths, attempt):
            say(f"{attempt} shows no progress within {WATCH_S:.0f} s")
            return False
        _asked(_request_stop, paths, _asked(_launch_of, paths, attempt))
        end = time.monotonic() + grace_s
        while time.monotonic() < end:
            if _asked(ended, paths, attempt):
                say(f"{attempt} saved and stopped")
                return True
            time.sleep(LOOK_S)
    except SkyspotError as error:
        say(f"{error}; SIGTERM will have it save")
        return False
    say(f"{attempt} has not stopped within {grace_s:.0f} s")
    return False


def _asked(function: Callable[..., _T], paths: RunPaths, *args: Any) -> _T:
    """What a function of a run's folder gives.

    Raises:
        UnreadableError: the folder cannot be read from here, or does not answer.
    """
    found: _T = aside.call(paths.root, _within, function, paths, *args, seconds=aside.ANSWER_S)
    return found


def _within(function: Callable[..., _T], paths: RunPaths, *args: Any) -> _T:
    with location.reading(paths):
        return function(paths, *args)


def _attempt_of(paths: RunPaths, job: str) -> AttemptName | None:
    """The newest attempt, where it is this job's: SkyPilot's task id ends in the job's id and the task's number."""
    attempts = list_attempts(paths)
    if attempts and _launch_of(paths, attempts[-1]).endswith(job):
        return attempts[-1]
    return None


def _launch_of(paths: RunPaths, attempt: AttemptName) -> str:
    return str((event_named(read_events(paths, attempt), "start") or {}).get("launch", ""))


def ended(paths: RunPaths, attempt: AttemptName) -> bool:
    """Whether an attempt wrote its end."""
    return event_named(read_events(paths, attempt), "end") is not None


def _progresses(paths: RunPaths, attempt: AttemptName) -> bool:
    """Whether the attempt's progress file changes, or its end appears, within the time of watching."""
    first, end = _asked(_progress_file, paths, attempt), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        if _asked(_progress_file, paths, attempt) != first or _asked(ended, paths, attempt):
            return True
        time.sleep(LOOK_S)
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
    """Whether a cancelled job has ended within the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = client.queue([job_id])
        if not found or not found[0].living:
            return True
        time.sleep(2 * LOOK_S)
    return False
