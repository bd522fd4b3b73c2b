"""Attempts: their numbers and the events that they record. Standard library only.

Only global rank 0 opens an attempt and writes its events. A second attempt that is alive at the same time writes into
folders of its own, because every name has a random part.
"""

from __future__ import annotations

import os
import platform
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.attempt.ending import STOP_REQUEST, SUPERSEDED, Ending
from trainer.attempt.identity import check_release, keep_identity
from trainer.attempt.limits import Reached
from trainer.attempt.price import price_here
from trainer.bucket.retry import retry
from trainer.layout.documents import (
    LAYOUT_VERSION,
    to_json,
    write_once,
)
from trainer.layout.events import last_event_number
from trainer.layout.names import AttemptName, RunPaths, file_safe, list_attempts, list_checkpoints
from trainer.machine.home import setup_seconds, since_setup_seconds
from trainer.machine.place import place
from trainer.machine.token import machine_token, process_started

_lock = threading.Lock()

_numbers: dict[Path, int] = {}
"""By attempt's folder: the number of the last event that this process wrote. A listing may not show that event yet."""


@dataclass(frozen=True)
class Attempt:
    """One life of the machines."""

    paths: RunPaths
    name: AttemptName
    launch: str
    machine: str
    """The machine's token, which lasts as long as its disk."""


def launch_id() -> str:
    """The id of this submission, the same across recoveries: the launcher's or SkyPilot's, or a random one."""
    if known := os.environ.get("SKYSPOT_LAUNCH"):
        return known
    task = os.environ.get("SKYPILOT_TASK_ID")
    return file_safe(task) if task else f"local-{secrets.token_hex(4)}"


def open_attempt(
    paths: RunPaths,
    *,
    launch: str,
    config: Mapping[str, Any],
    binding: Mapping[str, Any] | None,
    check_stop: Callable[[], None] = lambda: None,
    **facts: Any,
) -> Attempt:
    """Begin an attempt: take the next number and write its `start` event.

    Args:
        paths: The run's paths.
        launch: The launch's id.
        config: The configuration, recorded for readers only.
        binding: The configuration that binds the run. None if it is unknown: then run.json is not written (`adopt`).
        check_stop: Called while waiting; raises to stop.
        facts: Further fields of the `start` event.

    Raises:
        AttemptError: the bucket refused the attempt for ten minutes, or with an error that no retry helps against.
        LayoutVersionError: a newer release began this run.
    """
    here = place()
    fields = {
        "layout_version": LAYOUT_VERSION,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
        "python": platform.python_version(),
        "setup_s": setup_seconds(),
        "since_setup_s": since_setup_seconds(),
        "launched_s": _since_launch(),
        "place": {**here, **price_here(here)},
        "config": dict(config),
        "binding": dict(binding or {}),
        **facts,
    }

    def take_a_number() -> Attempt:
        check_release(paths)
        taken = [name.number for name in list_attempts(paths)]
        taken += [name.attempt.number for name in list_checkpoints(paths)]
        name = AttemptName(1 + max(taken, default=0), secrets.token_hex(3))
        paths.attempt(name).mkdir(parents=True)
        return Attempt(paths, name, launch, machine_token())

    attempt = retry(paths, take_a_number, check_stop)
    retry(paths, lambda: record(attempt, "start", launch=launch, machine=attempt.machine, **fields), check_stop)
    if binding is not None:
        retry(paths, lambda: keep_identity(paths, binding), check_stop)
    return attempt


def _since_launch() -> float | None:
    """The seconds since the launcher started on this machine; None without a launcher."""
    try:
        return round(max(0.0, time.monotonic() - float(os.environ["SKYSPOT_LAUNCHED_AT"])), 3)
    except (KeyError, ValueError):
        return None


def adopt(paths: RunPaths, name: AttemptName, launch: str, binding: Mapping[str, Any], **facts: Any) -> Attempt:
    """Take over the attempt that the launcher's sidecar opened: its script turns out to keep records itself.

    Raises:
        OSError: the event or run.json cannot be written.
    """
    attempt = Attempt(paths, name, launch, machine_token())
    record(attempt, "bound", binding=binding, **facts)
    keep_identity(paths, binding)
    return attempt


def record(attempt: Attempt, event: str, **fields: Any) -> None:
    """Write the attempt's next event: `time` in unix seconds, and `monotonic`, this machine's clock that nothing sets.

    Raises:
        OSError: the event could not be written.
    """
    with _lock:
        folder = attempt.paths.attempt(attempt.name)
        number = 1 + max(last_event_number(attempt.paths, attempt.name), _numbers.get(folder, 0))
        path = attempt.paths.event(attempt.name, number, event)
        try:
            write_once(path, to_json({**times(), **fields}))
        except FileExistsError:  # A try failed half-way, and the listing does not show its file yet.
            _numbers[folder] = number
            raise
        _numbers[folder] = number


def times() -> dict[str, float]:
    """The time now, in unix seconds and on the monotonic clock of this machine."""
    return {"time": round(time.time(), 3), "monotonic": round(time.monotonic(), 3)}


@dataclass(frozen=True)
class StopReason:
    """A reason to stop that rank 0 found in the bucket, or by its reckoning."""

    ending: Ending
    """Listed in `STOPS`."""
    message: str
    deadline: float | None = None
    """When all has to be saved, in seconds on the monotonic clock; None: a request, which says no time."""


def stop_reason(attempt: Attempt) -> StopReason | None:
    """The first reason in the bucket to stop this attempt; None if there is none.

    Raises:
        OSError: the bucket cannot be read.
    """
    if newer := newer_attempt(attempt):
        return StopReason(SUPERSEDED, superseded(newer))
    if stop_requested(attempt):
        return StopReason(STOP_REQUEST, "a stop was requested")
    return None


def record_limit(attempt: Attempt, reached: Reached) -> None:
    """Record a limit that is reached, with the numbers; a bucket that refuses it does not keep the attempt alive."""
    with suppress(OSError):
        record(attempt, "limit", **reached.facts)


def newer_attempt(attempt: Attempt) -> AttemptName | None:
    """The newest attempt with a higher number than this one's; None if there is none."""
    names = [name for name in list_attempts(attempt.paths) if name.number > attempt.name.number]
    return names[-1] if names else None


def superseded(newer: AttemptName) -> str:
    """The message of an attempt that stops because a newer one exists."""
    return f"a newer attempt exists ({newer}): this one stops"


def asked_to_stop(attempt: Attempt) -> str:
    """The message of an attempt that does not start because its launch was asked to stop."""
    return f"not started: {attempt.paths.stop(attempt.launch)} asks this launch to stop"


def stop_requested(attempt: Attempt) -> bool:
    """True if the user asked every attempt of this launch to save and stop; the file's existence is the request."""
    return attempt.paths.stop(attempt.launch).exists()
