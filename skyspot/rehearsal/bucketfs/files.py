"""The calls on open files, and on attributes. Part of the daemon."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import mfusepy

from skyspot.rehearsal.bucketfs import loop, manners
from skyspot.rehearsal.bucketfs.names import LIBC, WRITES, Handle, Names
from skyspot.rehearsal.bucketfs.trace import DELETED

T = TypeVar("T")
_NOT_BEHIND = os.O_APPEND | os.O_NOFOLLOW | getattr(os, "O_DIRECT", 0)
"""Flags that the kernel has dealt with already, or that would change what arrives here."""

_LARGE = 32 << 10
"""Bytes from which on it takes longer to write than to have another thread do it."""


class BucketFS(Names):
    """The file system."""

    # -- open files --------------------------------------------------------------------------------------------------

    def create(self, path: str, mode: int, fi: Any) -> int:
        """Create and open a file."""
        who, number, flags = self._who(), next(self._numbers), fi.flags

        def do() -> int:
            fd = os.open(self._at(path), (flags | os.O_CREAT) & ~_NOT_BEHIND, mode)
            self._give(path)
            return fd

        fd = self._recorder.change(do, "create", path[1:], who, handle=number, flags=flags)
        self._opened(Handle(number, fd, path[1:], flags, who), fi)
        return 0

    def open(self, path: str, fi: Any) -> int:
        """Open a file."""
        self._recorder.wait_if_struck()
        who, number, flags = self._who(), next(self._numbers), fi.flags
        writes, empties = bool(flags & WRITES), bool(flags & os.O_TRUNC)
        if writes and not empties and self._refuses(manners.SEEK) and os.stat(self._at(path)).st_size:
            what = manners.APPEND if flags & os.O_APPEND else manners.SEEK
            self._refuse(what, "open", path[1:], flags=flags)

        def do() -> int:
            if writes and self._store:
                self._store.opened(path[1:], empty=empties)
            return os.open(self._at(path), flags & ~_NOT_BEHIND)

        ended = self._recorder.change if empties else self._recorder.report
        fd = ended(do, "open", path[1:], who, handle=number, flags=flags)
        self._opened(Handle(number, fd, path[1:], flags, who), fi)
        return 0

    def _opened(self, handle: Handle, fi: Any) -> None:
        self._handles[handle.number] = handle
        fi.fh = handle.number
        # Without the page cache a write is one copy. But what is mapped for writing needs it, and that is O_RDWR.
        access = handle.flags & os.O_ACCMODE
        fi.direct_io = access == os.O_WRONLY or (access == os.O_RDWR and self._refuses(manners.MAP))

    def read_into(self, fh: int, pid: int, offset: int, memory: memoryview) -> int:
        """Read into memory; return how much."""
        self._recorder.wait_if_struck()
        handle = self._handles[fh]
        self.settle()
        # /proc is left alone: a process that waits for a mapped page may hold what reading its command line needs.
        who = self._who_on(handle, pid, look=False)
        try:
            done = os.preadv(handle.fd, [memory], offset)
        except OSError as error:
            self._recorder.record("read", handle.path, who, handle=fh, offset=offset, error=error.errno or 0)
            raise
        self._recorder.record("read", handle.path, who, handle=fh, offset=offset, size=done)
        return done

    def write_from(
        self, fh: int, pid: int, offset: int, memory: memoryview, answer: Callable[[], None], done: Callable[[], None]
    ) -> None:
        """Write; a large one is answered before, and what fails then is told by every later write, fsync and close.

        Args:
            fh: The file's handle.
            pid: Of the process that writes.
            offset: Where.
            memory: What.
            answer: Tells the process that it is written.
            done: Called when the memory may be used again, unless this raises.

        Raises:
            OSError: refused, or it failed, or an earlier one; it is not answered.
        """
        handle = self._handles[fh]
        who = self._who_on(handle, pid)
        behind = not self._recorder.has_strike and (self._behind.busy or len(memory) >= _LARGE)
        if offset != handle.end and self._refuses(manners.SEEK):
            self._refuse(manners.SEEK, "write", handle.path, who, handle=fh, offset=offset, size=len(memory))
        handle.check()
        if not behind:
            self._write(handle, who, offset, memory)
            answer()
            done()
            return
        handle.end = max(handle.end, offset + len(memory))

        def later() -> None:
            try:
                self._write(handle, who, offset, memory)
            except OSError as error:
                handle.error = error.errno or errno.EIO
            done()

        self._behind.put(later)
        answer()

    def _write(self, handle: Handle, who: tuple[int, str], offset: int, memory: memoryview) -> None:
        size = len(memory)

        def do(size: int = size) -> None:
            self._detach(handle)
            written = 0
            while written < size:
                written += os.pwritev(handle.fd, [memory[written:size]], offset + written)
                handle.end = max(handle.end, offset + written)
            handle.unclosed += size

        more = {"handle": handle.number, "offset": offset, "size": size}
        self._recorder.change(do, "write", handle.path, who, half=lambda: do(size // 2), **more)

    def settle(self) -> None:
        """Wait until writes that were answered are done."""
        self._behind.settle()

    def _detach(self, handle: Handle) -> None:
        """Keep what was uploaded as it is when the file that it was uploaded from is changed."""
        if self._store:
            self._store.changed(handle.path, linked=os.fstat(handle.fd).st_nlink > 1)

    def truncate(self, path: str | None, length: int, fi: Any = None) -> int:
        """Cut or extend a file, open or by its name."""
        if fi is None:
            place = self._at(path or "")
            handle = Handle(0, os.open(place, os.O_WRONLY), (path or "")[1:], 0, self._who())
        else:
            handle = self._handles[fi.fh]
        try:
            if length != os.fstat(handle.fd).st_size and self._refuses(manners.CUT):
                self._refuse(manners.CUT, "truncate", handle.path, size=length, handle=handle.number)

            def do() -> None:
                self._detach(handle)
                os.ftruncate(handle.fd, length)
                handle.end = length
                if self._store and fi is None:
                    self._store.closed(handle.path)

            self._change(do, "truncate", handle.path, size=length, handle=handle.number)
            handle.unclosed += 1
        finally:
            if fi is None:
                os.close(handle.fd)
        return 0

    def fallocate(self, path: str | None, mode: int, offset: int, length: int, fi: Any) -> int:
        """Reserve room, or punch a hole."""
        handle = self._handles[fi.fh]
        if self._refuses(manners.CUT):
            self._refuse(manners.CUT, "truncate", handle.path, size=length, handle=handle.number)

        def do() -> None:
            self._detach(handle)
            if LIBC.fallocate(handle.fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
                raise OSError(ctypes.get_errno(), "fallocate")

        self._change(do, "truncate", handle.path, offset=offset, size=length, handle=handle.number)
        handle.unclosed += 1
        return 0

    def fsync(self, path: str | None, datasync: int, fi: Any) -> int:
        """Have what was written on the disk, or in the bucket."""
        self._recorder.wait_if_struck()
        handle = self._handles[fi.fh]

        def do() -> None:
            if self._store is None:
                (os.fdatasync if datasync else os.fsync)(handle.fd)
            elif self._manners.fsync_uploads and handle.unclosed:
                self._store.closed(handle.path)
            handle.check()

        self._recorder.report(do, "fsync", handle.path, self._who_on(handle, _pid()), handle=fi.fh)
        return 0

    def flush(self, path: str | None, fi: Any) -> int:
        """Close one descriptor of an open file."""
        handle = self._handles[fi.fh]

        def do() -> None:
            if handle.unclosed:
                self._closed(handle)
            handle.check()

        who = self._who_on(handle, _pid(), look=False)  # A shell closes a duplicate before its exec.
        self._recorder.change(do, "close", handle.path, who, handle=fi.fh, size=handle.unclosed)
        return 0

    def _closed(self, handle: Handle) -> None:
        handle.unclosed, handle.fresh = 0, False
        if self._store and not handle.path.endswith(DELETED):
            self._store.closed(handle.path)

    def release(self, path: str | None, fi: Any) -> int:
        """Forget an open file."""
        handle = self._handles.pop(fi.fh)
        self._released(handle)
        os.close(handle.fd)
        return 0

    def _released(self, handle: Handle) -> None:
        # Written back from a mapping after its close; or empty, which at a close may be because a shell has only
        # duplicated it yet.
        if handle.unclosed or handle.fresh:
            self._recorder.exclusively(lambda: self._closed(handle))

    def finish(self) -> None:
        """Upload what waits. No process has a file open any more."""
        self.settle()
        for handle in list(self._handles.values()):
            self._released(handle)
        if self._store:
            self._store.finish()

    # -- the rest ----------------------------------------------------------------------------------------------------

    def chmod(self, path: str | None, mode: int, fi: Any = None) -> int:
        """Change a file's mode."""
        self._recorder.wait_if_struck()
        os.chmod(self._handles[fi.fh].fd if fi else self._at(path or ""), mode)
        return 0

    def chown(self, path: str | None, uid: int, gid: int, fi: Any = None) -> int:
        """Change a file's owner."""
        self._recorder.wait_if_struck()
        if fi:
            os.fchown(self._handles[fi.fh].fd, uid, gid)
        else:
            os.chown(self._at(path or ""), uid, gid, follow_symlinks=False)
        return 0

    def utimens(self, path: str | None, times: Any, fi: Any = None) -> int:
        """Change a file's times."""
        self._recorder.wait_if_struck()
        if fi:
            os.utime(self._handles[fi.fh].fd, ns=times)
        else:
            os.utime(self._at(path or ""), ns=times, follow_symlinks=False)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        """Describe the disk."""
        self._recorder.wait_if_struck()
        found = os.statvfs(self._root)
        return {key: getattr(found, key) for key in dir(found) if key.startswith("f_") and key != "f_fsid"}

    def init_with_config(self, conn: Any, config: Any) -> None:
        """Set the connection up."""
        self._config = config  # libfuse goes on looking at it.
        config.nullpath_ok = True
        config.entry_timeout = config.attr_timeout = config.negative_timeout = 1.0
        config.use_ino = True
        conn.max_write = loop.MAX_WRITE
        sys.stdout.write("mounted\n")  # The kernel asks for this call once the mount is there.
        sys.stdout.flush()


def _pid() -> int:
    return int(mfusepy.fuse_get_context()[2])
