"""A trace without FUSE: what can be told from a folder's files, looked at again and again.

It sees that a file appeared, grew, shrank, got another name or is gone, at the time of the look. It does not see: who
did it, what was read, a write that changes no size within the clock's tick, what came and went between two looks, and
when a file was closed: one that has been quiet for a while counts as closed.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from skyspot.rehearsal.bucketfs.trace import Call, read_trace

QUIET_S = 0.3
"""A file counts as closed when it has not changed for so long."""


@dataclass(frozen=True)
class _File:
    inode: int
    size: int
    mtime_ns: int


class Poller:
    """Writes the trace of one bucket, for as long as somebody calls `look`."""

    def __init__(self, bucket: Path, trace: Path) -> None:
        """Start from what the bucket holds now; the calls are added to the trace."""
        self._bucket, self._trace = bucket, trace
        self._number = len(read_trace(trace))
        self._files = _files(bucket)
        self._changed: dict[str, tuple[float, int, int]] = {}
        """When an open file changed last, its handle, and the bytes written since; by path."""

    def look(self, *, last: bool = False) -> None:
        """Add what has changed since the last look.

        Args:
            last: Whether nobody writes any more; all files then count as closed.
        """
        now, found = time.monotonic(), _files(self._bucket)
        names = {file.inode: path for path, file in self._files.items()}
        for path in sorted(found.keys() - self._files.keys()) + sorted(found.keys() & self._files.keys()):
            file, before = found[path], self._files.get(path)
            old = names.get(file.inode)
            if before is None or before.inode != file.inode:
                if old is not None and old != path and old not in found:
                    self._add(now, "rename", old, to=path)
                    self._changed[path] = self._changed.pop(old, (now, self._number, 0))
                    before = self._files[old]
                else:
                    self._changed[path] = (now, self._number, 0)
                    self._add(now, "create", path, handle=self._number, flags=os.O_CREAT | os.O_WRONLY)
                    before = _File(file.inode, 0, file.mtime_ns)
            self._grown(now, path, before, file)
        moved = {file.inode for file in found.values()}
        for path in sorted(self._files.keys() - found.keys()):
            self._changed.pop(path, None)
            if self._files[path].inode not in moved:
                self._add(now, "unlink", path)
        self._files = found
        for path, (since, handle, size) in list(self._changed.items()):
            if last or now - since >= QUIET_S:
                del self._changed[path]
                self._add(now, "close", path, handle=handle, size=size)

    def _grown(self, now: float, path: str, before: _File, file: _File) -> None:
        if (before.size, before.mtime_ns) == (file.size, file.mtime_ns):
            return
        _, handle, written = self._changed.get(path, (now, self._number, 0))
        if file.size < before.size:
            self._add(now, "truncate", path, handle=handle, size=file.size)
            written += 1
        else:
            # The same size: written over, and where cannot be told.
            offset = before.size if file.size > before.size else 0
            self._add(now, "write", path, handle=handle, offset=offset, size=file.size - offset)
            written += file.size - offset
        self._changed[path] = (now, handle, written)

    def _add(
        self, now: float, name: str, path: str, *, to: str = "", handle: int = 0, offset: int = 0, size: int = 0,
        flags: int = 0,
    ) -> None:  # fmt: skip
        call = Call(self._number, now, name, path, to=to, handle=handle, offset=offset, size=size, flags=flags)
        self._number += 1
        with self._trace.open("a") as file:
            file.write(json.dumps(asdict(call)) + "\n")


def _files(folder: Path) -> dict[str, _File]:
    """List the files below a folder; one that vanishes meanwhile is left out."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                about = path.lstat()
            except OSError:
                continue
            found[path.relative_to(folder).as_posix()] = _File(about.st_ino, about.st_size, about.st_mtime_ns)
    return found
