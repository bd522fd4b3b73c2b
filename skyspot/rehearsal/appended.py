"""Finding the journal of a task without checkpoints: a file that it appends its work to, and reads at each start."""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.rehearsal import naming
from skyspot.rehearsal.replay import Written

ENOUGH_WRITES = 4
"""Of a file with fewer, a strike leaves nothing to go on from."""


def find(reference: Written, later: Sequence[Written], results: Sequence[str] = ()) -> str:
    """The path of the journal; empty if there is none.

    Args:
        reference: The undisturbed run.
        later: Attempts that began with what an earlier one had left: they read it, before they write to it.
        results: Globs of the files that are compared at the end.
    """
    found = {
        version.path: version
        for version in reference.versions
        if version.appended and version.gone is None and version.writes >= ENOUGH_WRITES
    }
    restarts = [one for one in later if one.number > 1 and any(path in one.there for path in found)]
    if restarts:
        found = {path: one for path, one in found.items() if all(is_read(path, other) for other in restarts)}
    else:
        # What a restart will read is a guess: rather a result or a table than a log.
        found = {path: one for path, one in found.items() if not path.endswith((".log", ".out", ".err"))}
    return max(found, key=lambda path: (naming.matches(path, results), found[path].size), default="")


def is_read(path: str, written: Written) -> bool:
    """True if an attempt read all of a file before it wrote to it, or wrote nothing to it."""
    if path not in written.there:
        return True
    first = min((call.number for call in written.calls if call.name == "write" and call.path == path), default=None)
    read = [one for one in written.readings if one.path == path and one.whole]
    return any(first is None or one.first < first for one in read) or (first is None and not written.calls)
