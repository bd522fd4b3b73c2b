"""The commit: rank 0 makes a new folder count, or decides what to do instead; all ranks follow its verdict.

The ranks report their shares to rank 0, and rank 0 publishes its verdict, as JSON in the ranks' store. Nothing is read
from a directory listing.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.attempt.record import Attempt, newer_attempt, superseded
from trainer.bucket.deadlines import within
from trainer.checkpoint import writing
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.errors import describe, fatal_code
from trainer.checkpoint.share_report import ShareReport
from trainer.layout.exit_codes import EXIT_SUPERSEDED
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import STATE

TRIES = 6
FIRST_RETRY_S = 0.5


class MetricsHistory(Protocol):
    """Rank 0's record of metrics, as far as a checkpoint lists its files."""

    def history_until(self, step: int) -> Future[list[dict[str, Any]]]:
        """The closed files of metrics up to a step."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a save; neither committed nor tried again means given up."""

    committed: bool = False
    retry_s: float | None = None
    """Seconds until the next try; None: there is none."""
    code: int | None = None
    """The exit code that the attempt ends with at once."""
    message: str = ""
    torn: bool = False
    """A tensor was changed while it was copied."""
    spoilt: str = ""
    """A tensor of the checkpoint that is not finite; empty if all are."""

    def to_json(self) -> str:
        """The verdict as text for the store."""
        return json.dumps(asdict(self))


class StopDeadline:
    """When the attempt has to be over; far away until the ranks agree on a stop."""

    def __init__(self) -> None:
        self.at = math.inf
        """Monotonic seconds; no further try of a save starts after it."""
        self.agreed = threading.Event()

    def agree(self, at: float) -> None:
        """All ranks have agreed to stop by then (monotonic seconds)."""
        self.at = min(self.at, at)
        self.agreed.set()


def commit(
    boundary: Boundary,
    folder: Path,
    reports: Sequence[ShareReport],
    try_number: int,
    attempt: Attempt | None,
    records: MetricsHistory,
    stop: StopDeadline,
) -> Verdict:
    """Write what makes the folder count, once every rank has reported its share; or decide what to do instead.

    Args:
        boundary: What is saved.
        folder: The checkpoint's.
        reports: One of each rank.
        try_number: From 0, of this boundary.
        attempt: This one; a newer one supersedes it.
        records: The metrics, whose files the manifest lists.
        stop: The agreed stop.
    """
    torn = next((report.torn for report in reports if report.torn), None)
    if torn:
        return Verdict(
            torn=True,
            message=f"{torn} changed while it was copied; the checkpoint of step {boundary.step} is dropped. From now "
            "on training waits for the copy.",
        )
    failed = [report for report in reports if report.error is not None]
    if not failed:
        try:
            return _write_manifest(boundary, folder, reports, attempt, records)
        except OSError as error:
            failed = [ShareReport(error=describe(error, folder), code=fatal_code(error))]
    return _after_failure(boundary, failed, try_number, stop)


def _write_manifest(
    boundary: Boundary,
    folder: Path,
    reports: Sequence[ShareReport],
    attempt: Attempt | None,
    records: MetricsHistory,
) -> Verdict:
    """Write state.json and the manifest, unless a newer attempt exists."""
    assert boundary.plain is not None
    assert boundary.facts is not None
    files = {writing.share_name(rank): FileRecord(report.bytes, report.hash) for rank, report in enumerate(reports)}
    files[STATE] = writing.write_state(folder, boundary.plain)
    writing.at_point("state-written")
    with within("listing attempts"):
        newer = newer_attempt(attempt) if attempt else None
    if newer:
        return Verdict(code=EXIT_SUPERSEDED, message=superseded(newer))
    history = records.history_until(boundary.step).result()
    spoilt = next((report.spoilt for report in reports if report.spoilt), "")
    facts = {**boundary.facts, "finite": not spoilt, "metrics": history}
    writing.write_manifest(folder, Manifest("checkpoint", files, facts))
    return Verdict(committed=True, spoilt=spoilt)


def _after_failure(boundary: Boundary, failed: Sequence[ShareReport], try_number: int, stop: StopDeadline) -> Verdict:
    """Decide whether to try again, to give up, or to end the attempt."""
    code = next((report.code for report in failed if report.code is not None), None)
    message = f"The checkpoint of step {boundary.step} could not be written: {failed[0].error}"
    retry_s = FIRST_RETRY_S * 2 ** min(try_number, TRIES)
    enough = try_number >= TRIES - 1
    if boundary.last and stop.at < math.inf:  # What the deadline leaves belongs to this save.
        retry_s, enough = min(retry_s, 2 * FIRST_RETRY_S), False
    late = time.monotonic() + retry_s > stop.at or (stop.agreed.is_set() and not boundary.last)
    if code is not None or enough or late:
        return Verdict(code=code, message=message)
    return Verdict(retry_s=retry_s, message=f"{message}; trying again in {retry_s:g} s")
