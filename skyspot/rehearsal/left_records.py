"""The records that the preempted run of a rehearsal has left, for its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from skyspot.errors import SkyspotError
from skyspot.rehearsal.legs import Legs
from skyspot.rehearsal.result import PREEMPTED

if TYPE_CHECKING:
    from skyspot.runs.records import RunRecords

NOT_PREEMPTED = "nothing was preempted, as the undisturbed run did not finish"
NO_RECORDS = (
    "the task keeps no records of its attempts. A script with SpotRun does, and one that is started by "
    "`python -m trainer.launch`"
)


def left_records(legs: Legs, gone: Path | None) -> tuple[RunRecords | None, str]:
    """The records of the preempted run; without any, the reason.

    Args:
        legs: The legs of the rehearsal.
        gone: The folder of the rehearsal, if it will be deleted: the run is then named by its path below it.
    """
    from skyspot.runs.records import read_records  # Rarely needed.

    if not any(leg.name == PREEMPTED for leg in legs.all):
        return None, NOT_PREEMPTED
    paths = legs.paths(PREEMPTED)
    try:
        records = read_records(paths) if paths else None
    except Exception as error:  # Whatever it is, the verdict stands.
        return None, told(error)
    if records is None or not records.attempts:
        return None, NO_RECORDS
    if paths and gone:
        records = dataclasses.replace(records, root=str(paths.root.relative_to(gone)))
    return records, ""


def told(error: Exception) -> str:
    """Why there is no report, in a line."""
    return str(error) if isinstance(error, SkyspotError) else f"{type(error).__name__}: {error}, an error of skyspot's"
