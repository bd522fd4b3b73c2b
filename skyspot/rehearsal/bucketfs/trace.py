"""The trace of a bucket: one line of JSON for each call that a machine's processes made on it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DELETED = " (deleted)"
"""Ends the path of a file that is still open after it was deleted or another was renamed over it, as in /proc."""

MAPPED = "map"
"""The name of a call: a file was opened and closed, and no read of it was seen. It may have been mapped into memory."""
GAP = "gap"
"""The name of a call that stands for calls that were missed; `to` tells why."""

CALLS, EVENTS, POLLS = "calls", "events", "polls"
"""How a trace was made: each call (FUSE), the system's file events (inotify), or looks at the files (no reads)."""


@dataclass(frozen=True)
class Call:
    """One call on the bucket, at the time it ended."""

    number: int
    """From 0, in the order in which the calls ended. It goes on when the machine starts a second script."""
    time: float
    """time.monotonic(), the same clock in all of a machine's namespaces."""
    name: str
    """open, create, read, write, truncate, rename, link, symlink, unlink, mkdir, rmdir, fsync, close; upload: a file
    has arrived in the bucket, where that is later than its close. MAPPED and GAP: of a watcher alone."""
    path: str
    """Relative to the bucket, without a leading slash."""
    to: str = ""
    """The new path of a rename or link; what a symbolic link points to."""
    pid: int = 0
    """In the machine's own process namespace; 0 where the kernel writes back what was mapped."""
    process: str = ""
    """Its command line, shortened: `python train.py`."""
    handle: int = 0
    """The same from open or create to close. A descriptor that was duplicated or inherited is closed several times."""
    offset: int = 0
    size: int = 0
    """Bytes read or written; the length that a file is cut to."""
    flags: int = 0
    """open()'s."""
    error: int = 0
    """errno; 0: it succeeded."""
    refused: str = ""
    """What this kind of mount does not permit, if that is why it failed."""
    struck: str = ""
    """before, middle or after: the strike fell on this call, and nothing later reached the bucket."""


_NAMES = frozenset(field.name for field in fields(Call))


def read_trace(path: Path) -> list[Call]:
    """Read a whole trace; empty if there is none."""
    return read_from(path, 0)[0]


def read_from(path: Path, place: int) -> tuple[list[Call], int]:
    """Read the calls after a place in the file; return them, and the place after the last whole line."""
    try:
        with path.open("rb") as file:
            file.seek(place)
            data = file.read()
    except OSError:
        return [], place
    whole = data.rfind(b"\n") + 1
    return [call for line in data[:whole].splitlines() if (call := _call(line))], place + whole


def _call(line: bytes) -> Call | None:
    """Read one line; None for what a killed machine left half written."""
    try:
        found: Any = json.loads(line)
        return Call(**{key: value for key, value in found.items() if key in _NAMES})
    except (ValueError, TypeError, AttributeError):
        return None
