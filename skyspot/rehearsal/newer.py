"""What is newer than the save that an attempt went on from: another checkpoint, or a file that it read too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skyspot.rehearsal import naming
from skyspot.rehearsal.files import Files
from skyspot.rehearsal.replay import Written
from skyspot.rehearsal.saves import Save, group, state


def checkpoint(files: Files, used: Save, before: Sequence[Written], written: Written) -> Save | None:
    """The newest save of the files that the run keeps beside its best ones, if it is clearly newer; else None.

    Args:
        files: What was learnt of the run's files.
        used: The save that the attempt went on from.
        before: The attempts before it.
        written: The attempt.
    """
    if files.last is None:
        return None
    others = replace(files, family=files.last)
    saves = [save for one in before for save in group(others, one, ())]
    newest = state(others, saves, written.there, written.cut).newest
    # The first one may be of the same step: some scripts save the best first, others the last.
    later = [save for save in saves if save.complete is not None and _is_later(save, used)]
    return newest if newest is not None and newest in later[1:] else None


def _is_later(save: Save, used: Save) -> bool:
    return save.attempt > used.attempt or (save.attempt == used.attempt and save.begun > (used.complete or 0))


def file(files: Files, used: Save, before: Sequence[Written], written: Written) -> str:
    """A file that the attempt read at its start, no part of the checkpoint, and written after it; empty if none is."""
    since_s = used.complete_s
    kinds = files.family.kinds if files.family else ()
    own = min((one.begun for one in written.versions if files.kind_of(one) in kinds), default=None)
    for reading in written.readings:
        path = reading.path
        if naming.parse(path).kind in kinds or not reading.whole or (own is not None and reading.first > own):
            continue
        writes = [call.time for one in before for call in one.calls if call.name == "write" and call.path == path]
        if writes and since_s is not None and writes[-1] > since_s:
            return path
    return ""
