"""The time without a machine: by SkyPilot's record of the job, or by the clocks of the attempts' machines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from skyspot.money.attempts import Life

SKYPILOT, CLOCKS = "SkyPilot", "the machines' clocks"
_RECOVERING, _RUNNING = "RECOVERING", "RUNNING"
_WAITING = ("PENDING", "STARTING", _RECOVERING)
_TASK_FAILED = "USER_JOB_FAILURE"
"""The code of a recovery after the task has exited on a healthy machine (sky/jobs/state.py)."""
_TASK_ID = re.compile(r"sky-managed-\d{4}-.+_(\d+)-(\d+)")
_BY_A_PERSON = re.compile(r"\bby user\b|\brequested\b", re.IGNORECASE)


@dataclass(frozen=True)
class Wait:
    """The time before an attempt in which there was no machine."""

    seconds: float
    source: str
    """SKYPILOT or CLOCKS."""
    why: str
    """The reason that SkyPilot's record gives; empty: none."""


@dataclass(frozen=True)
class StatusChange:
    """A line of SkyPilot's record of a job. All times are by the clock of SkyPilot's server."""

    at: float
    status: str
    reason: str
    code: str
    source: str
    """FAILURE, EMERGENCY or RESTART, for a recovery (RecoverySource in sky/jobs/state.py); empty: not said."""


def status_change(row: Mapping[str, Any]) -> StatusChange | None:
    """A row of SkyPilot's record of a job; None if it has no time."""
    at, status = row.get("timestamp"), row.get("new_status")
    try:
        at = datetime.fromisoformat(at) if isinstance(at, str) else at
        seconds = at.timestamp() if isinstance(at, datetime) else float(at)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    reason, code, source = (str(row.get(key) or "") for key in ("reason", "code", "recovery_source"))
    return StatusChange(seconds, str(getattr(status, "value", status)), " ".join(reason.split()), code, source)


@dataclass(frozen=True)
class JobTask:
    """A launch as SkyPilot numbers it."""

    job_id: int
    task: int


def job_of_launch(launch: str) -> JobTask | None:
    """The job and task in a launch's id, which is SkyPilot's (SKYPILOT_TASK_ID); None if it is no managed job's."""
    found = _TASK_ID.fullmatch(launch)
    return JobTask(int(found[1]), int(found[2])) if found else None


def waits_by_clocks(lives: Sequence[Life]) -> tuple[dict[str, Wait], list[str]]:
    """The waits between attempts by their machines' clocks, which may disagree; and notes on those that do."""
    waits: dict[str, Wait] = {}
    notes: list[str] = []
    for before, after in pairwise(lives):
        if before.ended_at is None or after.began_at is None:
            continue
        seconds = after.began_at - before.ended_at
        if seconds < 0 and before.machine != after.machine:
            notes.append(
                f"{after.name} began {-seconds:.0f} s before {before.name} ended, by their machines' clocks: these "
                "disagree, or both attempts were alive. No time is counted between them."
            )
        waits[after.name] = Wait(max(0.0, seconds), CLOCKS, "")
    return waits, notes


def waits_by_skypilot(lives: Sequence[Life], changes: Sequence[StatusChange]) -> tuple[dict[str, Wait], set[str], str]:
    """The waits of one launch's attempts by SkyPilot's record of its job.

    Args:
        lives: The attempts of the launch.
        changes: SkyPilot's record, oldest first.

    Returns:
        The waits by attempt; the attempts after which came a recovery that is none from a preemption; and a note,
        empty if SkyPilot's record fits the attempts.
    """
    found: list[tuple[float, StatusChange]] = []
    since: StatusChange | None = None
    for change in changes:
        if change.status in _WAITING:
            since = since or change
        elif change.status == _RUNNING and since:
            found.append((max(0.0, change.at - since.at), since))
            since = None
    if len(found) != len(lives):
        return {}, set(), (
            f"SkyPilot's record of the job has {len(found)} starts, and there are {len(lives)} attempts: waiting is "
            f"taken from {CLOCKS}."
        )  # fmt: skip
    waits = {
        life.name: Wait(seconds, SKYPILOT, since.reason if since.status == _RECOVERING else "")
        for life, (seconds, since) in zip(lives, found, strict=True)
    }
    others = {life.name for life, (_, since) in zip(lives, found[1:], strict=False) if not _is_of_machine(life, since)}
    return waits, others, ""


def _is_of_machine(life: Life, recovery: StatusChange) -> bool:
    """True if a recovery may have followed a lost machine: not if a person or SkyPilot itself asked for it.

    The exit of a task on a healthy machine is a preemption only if the attempt has recorded one: then it left at it.
    """
    if recovery.source not in ("", "FAILURE") or _BY_A_PERSON.search(recovery.reason):
        return False
    return recovery.code != _TASK_FAILED or life.has_end


def launches(lives: Sequence[Life]) -> Mapping[str, list[Life]]:
    """The attempts by launch, in order."""
    found: dict[str, list[Life]] = {}
    for life in lives:
        found.setdefault(life.launch, []).append(life)
    return found
