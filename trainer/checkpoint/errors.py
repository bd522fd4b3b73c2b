"""Errors of the bucket that end an attempt, and how they are worded."""

from __future__ import annotations

from pathlib import Path

from trainer.bucket.retry import MOUNT_GONE, REFUSED
from trainer.errors import TrainerError
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from trainer.machine.scratch import FULL


class BucketError(TrainerError):
    """The bucket fails; the attempt ends with `code`."""


class SaveError(BucketError):
    """The bucket cannot be written."""


class ReadError(BucketError):
    """The bucket cannot be read; the attempt does not start from an earlier state instead."""


def fatal_code(error: OSError) -> int | None:
    """The exit code that a failed call ends the attempt with at once; None if it is worth another try."""
    if error.errno in FULL | REFUSED:
        return EXIT_FAILED
    return EXIT_PREEMPTED if error.errno in MOUNT_GONE else None


def describe(error: OSError, where: Path) -> str:
    """The place, the reason and the remedy, in a line."""
    reason = f"{where}: {error.strerror or error}"
    if error.errno in FULL:
        return f"{reason}. Free some space there, or use another bucket; no committed checkpoint is lost."
    if error.errno in REFUSED:
        return f"{reason}. Give this machine permission to write there; no committed checkpoint is lost."
    return reason
