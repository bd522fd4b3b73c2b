"""A trace without file events: what can be told from a folder's files, looked at again and again.

It sees that a file appeared, grew, shrank, got another name or is gone, at the time of the look. It does not see: who
did it, what was read, a write that changes no size within the clock's tick, what came and went between two looks, and
when a file was closed: one that has been quiet for a while, was renamed or has another in its place counts as closed.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from skyspot.rehearsal.bucketfs.calls import Calls

QUIET_S = 0.3
"""A file counts as closed when it has not changed for so long."""
_PART = 5
"""The wait between two looks is at least so many times as long as a look."""


@dataclass(frozen=True)
class _File:
    inode: int
    size: int
    mtime_ns: int


class Poller:
    """Turns the changes of one bucket's files into calls."""

    def __init__(self, bucket: Path, calls: Calls) -> None:
        """Begin with what the bucket holds now."""
        self._bucket, self._calls = bucket, calls
        self._files = _files(bucket)
        self._changed: dict[str, tuple[float, int, int]] = {}
        """When an open file changed last, its handle, and the bytes written since; by path."""
        self._took_s = 0.0
        """Seconds that the last look took."""
        self._cut = False

    def wait(self, seconds: float) -> None:
        """Wait; for longer where a look takes long."""
        time.sleep(max(seconds, _PART * self._took_s))

    def look(self) -> None:
        """Add what has changed since the last look."""
        now, found = time.monotonic(), _files(self._bucket)
        names = {file.inode: path for path, file in self._files.items()}
        for path in sorted(found.keys() - self._files.keys()) + sorted(found.keys() & self._files.keys()):
            file, before = found[path], self._files.get(path)
            old = names.get(file.inode)
            if before is None or before.inode != file.inode:
                self._close(path)
                if old is not None and old != path and old not in found:
                    self._close(old)
                    self._calls.add("rename", old, to=path)
                    before = self._files[old]
                else:
                    handle = len(self._calls.all)
                    self._calls.add("create", path, handle=handle, flags=os.O_CREAT | os.O_WRONLY)
                    self._changed[path] = (now, handle, 0)
                    before = _File(file.inode, 0, file.mtime_ns)
            self._grown(now, path, before, file)
        moved = {file.inode for file in found.values()}
        for path in sorted(self._files.keys() - found.keys()):
            self._changed.pop(path, None)
            if self._files[path].inode not in moved:
                self._calls.add("unlink", path)
        self._files = found
        self._close_quiet(now - QUIET_S)
        self._took_s = time.monotonic() - now

    def _close_quiet(self, since: float) -> None:
        for path, (changed, _, _) in list(self._changed.items()):
            if changed <= since:
                self._close(path)

    def _close(self, path: str) -> None:
        """Write down that a file was closed: it is quiet, or was renamed, or another took its place."""
        if path in self._changed:
            _, handle, size = self._changed.pop(path)
            self._calls.add("close", path, handle=handle, size=size)

    def kill_comes(self) -> None:
        """Take in what has happened before the machine is killed; what changed just now may not be whole."""
        self.look()
        self._cut = True

    def finish(self) -> None:
        """Take in the rest. The machine is gone."""
        self.look()
        if not self._cut:
            self._close_quiet(time.monotonic())

    def _grown(self, now: float, path: str, before: _File, file: _File) -> None:
        if (before.size, before.mtime_ns) == (file.size, file.mtime_ns):
            return
        _, handle, written = self._changed.get(path, (now, len(self._calls.all), 0))
        if file.size < before.size:
            self._calls.add("truncate", path, handle=handle, size=file.size)
            written += 1
        else:
            # The same size: written over, and where cannot be told.
            offset = before.size if file.size > before.size else 0
            self._calls.add("write", path, handle=handle, offset=offset, size=file.size - offset)
            written += file.size - offset
        self._changed[path] = (now, handle, written)


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
