"""A strike: the machine is lost exactly at one call on its bucket."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from skyspot.rehearsal.bucketfs.trace import Call

PHASES = ("before", "middle", "after")
_CHANGES = frozenset({"create", "write", "truncate", "rename", "link", "symlink", "unlink", "mkdir", "rmdir", "upload"})


@dataclass(frozen=True)
class Strike:
    """Where it falls: on one of the calls that change the bucket."""

    number: int
    """How many calls that count go through before it; an index into `points`."""
    phase: str
    """before: the call is not done. after: it is done. middle: half of a write's bytes are there; a rename that copies
    has copied and not deleted; any other call is not done."""
    only: tuple[str, ...] = ()
    """Regular expressions, searched in a call's path; if there are any, only such paths count."""
    ignore: tuple[str, ...] = ()
    """Regular expressions of paths that do not count."""
    does: str = ""
    """What a call that counts does, as in `deed`; empty: anything."""

    def counts(self, name: str, path: str) -> bool:
        """Whether a call counts that changes the bucket."""
        if self.does and deed(name) != self.does:
            return False
        if self.only and not any(re.search(pattern, path) for pattern in self.only):
            return False
        return not any(re.search(pattern, path) for pattern in self.ignore)


def deed(name: str) -> str:
    """What a call that changes the bucket does: its name; to create a file and to empty one are the same."""
    return "open" if name == "create" else name


def changes(name: str, flags: int, size: int) -> bool:
    """Whether a call changes the bucket: also an open that empties the file, and the close of one that was written."""
    return name in _CHANGES or (name == "open" and bool(flags & os.O_TRUNC)) or (name == "close" and size > 0)


def points(calls: Iterable[Call], only: tuple[str, ...] = (), ignore: tuple[str, ...] = ()) -> list[Call]:
    """List the calls of a trace that a strike could fall on, in their order."""
    strike = Strike(0, "before", only, ignore)
    return [
        call
        for call in calls
        if not call.refused and changes(call.name, call.flags, call.size) and strike.counts(call.name, call.path)
    ]
