"""The calls on names: folders, renames, links. And what each call does first. Part of the daemon."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mfusepy

from skyspot.rehearsal.bucketfs import manners
from skyspot.rehearsal.bucketfs.behind import WriteBehind
from skyspot.rehearsal.bucketfs.manners import MANNERS
from skyspot.rehearsal.bucketfs.recorder import Recorder
from skyspot.rehearsal.bucketfs.store import Store
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.bucketfs.trace import DELETED

T = TypeVar("T")
WRITES = os.O_WRONLY | os.O_RDWR
LIBC = ctypes.CDLL(None, use_errno=True)


class Handle:
    """An open file."""

    __slots__ = ("end", "error", "fd", "flags", "fresh", "number", "path", "pid", "processes", "unclosed")

    def __init__(self, number: int, fd: int, path: str, flags: int, who: tuple[int, str]) -> None:
        self.number, self.fd, self.path, self.flags, self.pid = number, fd, path, flags, who[0]
        self.processes = {0: who[1]}
        """Command lines by pid; 0: of the one that opened it, which may be a shell before its exec."""
        self.end = os.fstat(fd).st_size
        self.error = 0
        """errno of a write that failed after it was answered."""
        self.unclosed = 0
        """Bytes written since its last close."""
        self.fresh = bool(flags & (os.O_CREAT | os.O_TRUNC) and flags & WRITES)
        """Created or emptied, and neither written nor uploaded since."""

    def check(self) -> None:
        """Tell of a write that failed after it was answered; each time, as the kernel drops it after a short write.

        Raises:
            OSError: one did.
        """
        if self.error:
            raise OSError(self.error, "write")


class Names(mfusepy.Operations):  # type: ignore[misc]
    """The calls on names."""

    use_ns = True

    def __init__(self, config: dict[str, Any]) -> None:
        strike = config.get("strike")
        self._recorder = Recorder(Path(config["trace"]), Path(config["proc"]), Strike(**strike) if strike else None)
        self._manners = MANNERS[config["manners"]]
        bucket = Path(config["bucket"])
        self._store = None
        if not self._manners.direct:
            self._store = Store(bucket, Path(config["disk"]), self._manners, self._recorder)
        self._root = str(self._store.view if self._store else bucket)
        self._handles: dict[int, Handle] = {}
        self._behind = WriteBehind()
        self._numbers = itertools.count(self._recorder.first_number + 1)
        self._by_pid: dict[int, str] = {}
        self._config: Any = None
        os.umask(0)

    # -- what each call does first -----------------------------------------------------------------------------------

    def _who(self) -> tuple[int, str]:
        """Who makes this call: pid and command line, which is read anew because a shell opens files before exec."""
        pid = mfusepy.fuse_get_context()[2]
        process = self._by_pid[pid] = self._recorder.process(pid) or self._by_pid.get(pid, "")
        return pid, process

    def _who_on(self, handle: Handle, pid: int, *, look: bool = True) -> tuple[int, str]:
        """Who makes this call on an open file; quick, and without /proc unless it is to look."""
        process = handle.processes.get(pid)
        if process is None:
            known = self._by_pid.get(pid) or handle.processes[0]
            if not look:
                return pid or handle.pid, known
            process = handle.processes[pid] = self._recorder.process(pid) or known
        return pid or handle.pid, process

    def _change(self, do: Callable[[], T], name: str, path: str, **more: Any) -> T:
        """Do and record a call that changes the bucket."""
        return self._recorder.change(do, name, path, self._who(), **more)

    def _refuse(self, what: str, name: str, path: str, who: tuple[int, str] | None = None, **more: Any) -> NoReturn:
        number = self._manners.refuses[what]
        self._recorder.record(name, path, who or self._who(), error=number, refused=what, **more)
        raise OSError(number, what)

    def _refuses(self, what: str) -> bool:
        return what in self._manners.refuses

    def _at(self, path: str) -> str:
        return self._root + path

    # -- names -------------------------------------------------------------------------------------------------------

    def getattr(self, path: str | None, fi: Any = None) -> dict[str, int]:
        """Describe a file."""
        self._recorder.wait_if_struck()
        found = os.fstat(self._handles[fi.fh].fd) if fi else os.lstat(self._at(path or ""))
        links = found.st_nlink
        if self._store and not stat.S_ISDIR(found.st_mode):
            links = min(links, 1)  # The second is the bucket's.
        elif links > 1 and not stat.S_ISDIR(found.st_mode):
            self._config.attr_timeout = 0.0  # The kernel takes the names of one file for several files.
        keys = ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize")
        return {key: getattr(found, key) for key in keys} | {
            "st_nlink": links, "st_atime": found.st_atime_ns, "st_mtime": found.st_mtime_ns,
            "st_ctime": found.st_ctime_ns,
        }  # fmt: skip

    def opendir(self, path: str) -> int:
        """Open a folder."""
        self._recorder.wait_if_struck()
        return os.open(self._at(path), os.O_RDONLY | os.O_DIRECTORY)

    def readdir(self, path: str | None, fh: int) -> list[Any]:
        """List a folder."""
        self._recorder.wait_if_struck()
        found: list[Any] = [".", ".."]
        with os.scandir(fh) as entries:
            for entry in entries:
                kind = stat.S_IFLNK if entry.is_symlink() else stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
                found.append((entry.name, {"st_mode": kind, "st_ino": entry.inode()}, 0))
        return found

    def releasedir(self, path: str | None, fh: int) -> int:
        """Close a folder."""
        os.close(fh)
        return 0

    def readlink(self, path: str) -> str:
        """Read a symbolic link."""
        self._recorder.wait_if_struck()
        return os.readlink(self._at(path))

    def mkdir(self, path: str, mode: int) -> int:
        """Make a folder."""

        def do() -> None:
            if self._store:
                self._store.mkdir(path[1:], mode)
            else:
                os.mkdir(self._at(path), mode)
                self._give(path)

        self._change(do, "mkdir", path[1:])
        return 0

    def rmdir(self, path: str) -> int:
        """Delete a folder."""
        do = self._store.rmdir if self._store else lambda path: os.rmdir(self._at(f"/{path}"))
        self._change(lambda: do(path[1:]), "rmdir", path[1:])
        return 0

    def unlink(self, path: str) -> int:
        """Delete a file."""

        def do() -> None:
            if self._store:
                self._store.unlink(path[1:])
            else:
                os.unlink(self._at(path))
            self._moved(path[1:], path[1:] + DELETED)

        self._change(do, "unlink", path[1:])
        return 0

    def symlink(self, path: str, source: str) -> int:
        """Make a symbolic link."""
        if self._refuses(manners.SYMLINK):
            self._refuse(manners.SYMLINK, "symlink", path[1:], to=source)

        def do() -> None:
            if self._store:
                self._store.symlink(path[1:], source)
            else:
                os.symlink(source, self._at(path))
                self._give(path)

        self._change(do, "symlink", path[1:], to=source)
        return 0

    def link(self, target: str, source: str) -> int:
        """Give a file a second name."""
        if self._refuses(manners.LINK):
            self._refuse(manners.LINK, "link", source[1:], to=target[1:])

        def do() -> None:
            self._config.attr_timeout = 0.0
            os.link(self._at(source), self._at(target), follow_symlinks=False)

        self._change(do, "link", source[1:], to=target[1:])
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        """Rename a file or folder."""
        source, target = old[1:], new[1:]
        folder = os.path.isdir(self._at(old)) and not os.path.islink(self._at(old))
        if folder and self._refuses(manners.RENAME_FULL) and os.listdir(self._at(old)):
            self._refuse(manners.RENAME_FULL, "rename", source, to=target)
        if flags and self._store:
            raise OSError(errno.EINVAL, "flags")

        def do() -> None:
            if self._store:
                self._store.rename(source, target)
            elif flags:
                if LIBC.renameat2(-100, os.fsencode(self._at(old)), -100, os.fsencode(self._at(new)), flags):
                    raise OSError(ctypes.get_errno(), "rename")
            else:
                os.rename(self._at(old), self._at(new))
            if not flags & 2:  # Not an exchange.
                self._moved(target, target + DELETED)
            self._moved(source, target)

        store = self._store
        half = (lambda: store.rename_half(source, target)) if store else None
        self._change(do, "rename", source, half=half, to=target)
        return 0

    def _moved(self, old: str, new: str) -> None:
        """Have open files known by their new path."""
        for handle in list(self._handles.values()):
            if handle.path == old or handle.path.startswith(f"{old}/"):
                handle.path = new + handle.path[len(old) :]

    def _give(self, path: str) -> None:
        """Let what was made belong to who made it."""
        user, group, _ = mfusepy.fuse_get_context()
        if (user, group) != (os.geteuid(), os.getegid()):
            os.chown(self._at(path), user, group, follow_symlinks=False)
