"""The check that a run's folder lies in a mounted bucket, before anything is written. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.bucket import deadlines
from trainer.bucket.retry import START_RETRY_S
from trainer.errors import AttemptError
from trainer.layout.exit_codes import EXIT_FAILED
from trainer.layout.names import RunPaths


def check_bucket(paths: RunPaths) -> None:
    """Refuse to train into a folder that is lost with the machine.

    Raises:
        AttemptError: no bucket is mounted at SKYSPOT_MOUNT, or the parent of the run's folder is missing.
    """
    with deadlines.within("looking at the mount", START_RETRY_S, EXIT_FAILED):
        _check_bucket(paths, os.environ.get("SKYSPOT_MOUNT"))


def _check_bucket(paths: RunPaths, mount: str | None) -> None:
    if not mount:
        if not paths.root.parent.is_dir():
            raise AttemptError(
                f"{paths.root.parent}: no such folder. It is not created automatically, because a bucket that failed "
                "to mount would look the same. Mount the bucket, or create the folder yourself."
            )
        return
    try:
        device = Path(mount).stat().st_dev
    except OSError as error:
        raise AttemptError(f"{mount}: {error.strerror}. SKYSPOT_MOUNT says that the bucket is mounted there.") from None
    if device == Path("/").stat().st_dev:
        raise AttemptError(
            f"{mount}: no bucket is mounted there (the folder is on the machine's own disk, which is lost with the "
            "machine). Nothing was written. See the job's log for the mount; for a shared folder, unset SKYSPOT_MOUNT."
        )
