"""From a folder's file events to the calls that caused them.

An event names a file. It does not tell who caused it, which open file it is of, or where and how much was read or
written. So a file that is read counts as read whole, and the sizes are those that the file has a moment later. One
`write` stands for all writes in a fifth of a second.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from skyspot.rehearsal import naming
from skyspot.rehearsal.bucketfs.calls import Calls
from skyspot.rehearsal.bucketfs.trace import MAPPED

_ANOTHER_WRITE_S = 0.2
_NOTHING = "read"
"""A read of 0 bytes tells nothing: it keeps the place of a call that is not known yet."""


@dataclass
class _Open:
    """A file was opened, and what for is not known before it is read, written or closed."""

    call: int
    """Number of the open."""
    place: int
    """Number of the call after it, kept for the read."""
    read: bool = False


@dataclass
class _Again:
    """A file that was there was opened and written to."""

    path: str
    open: int
    """Number of the open."""
    before: int
    """Its size before, in bytes."""
    size: int = 0
    """Its size afterwards."""
    write: int | None = None
    """Number of the first write."""
    emptied: bool = False
    """It was seen to be shorter than before, or empty."""

    @property
    def grew(self) -> bool:
        return not self.emptied and self.size > self.before > 0


@dataclass
class _File:
    inode: int
    size: int
    handle: int = -1
    """Of those who write to it; -1: nobody does."""
    writers: int = 0
    opening: bool = False
    """It was created or emptied by an open, of which the event comes next."""
    create: int | None = None
    """Number of the call that created it; a file that is created and not opened is a link."""
    write: int | None = None
    """Number of the last write."""
    written: bool = False
    """That write is of those who write to it now."""
    close: int | None = None
    """Number of a close that nobody saw: it was there when its folder was found."""
    opens: list[_Open] = field(default_factory=list)
    again: list[_Again] = field(default_factory=list)


class Events:
    """Takes the events of one folder in their order, and writes down calls."""

    def __init__(self, folder: Path, calls: Calls) -> None:
        """Begin with what the folder holds now."""
        self._folder, self._calls = folder, calls
        self._files: dict[str, _File] = {}
        self.dying = False
        """The machine is being killed: that closes every file, whole or not."""
        for root, _, names in os.walk(folder):
            for name in names:
                path = (Path(root) / name).relative_to(folder).as_posix()
                if about := self._look(path):
                    self._files[path] = _File(about.st_ino, about.st_size)

    def _look(self, path: str) -> os.stat_result | None:
        try:
            return (self._folder / path).lstat()
        except OSError:
            return None

    # -- events ------------------------------------------------------------------------------------------------------

    def created(self, path: str) -> None:
        """A file was created; or a link."""
        about, known = self._look(path), self._files.get(path)
        if about and known and known.inode == about.st_ino:
            return  # It was found before.
        if about and stat.S_ISLNK(about.st_mode):
            self._calls.add("symlink", path)
            self._files[path] = _File(about.st_ino, 0)
            return
        same = (
            [old for old, one in self._files.items() if one.inode == about.st_ino]
            if about and about.st_nlink > 1
            else []
        )
        if same and path not in same:
            self._calls.add("link", same[0], to=path)
            self._files[path] = self._files[same[0]]
            return
        self._begin(path, about, opening=True)

    def _begin(self, path: str, about: os.stat_result | None, *, opening: bool) -> _File:
        handle = len(self._calls.all) + 1
        create = self._calls.add("create", path, handle=handle, flags=os.O_CREAT | os.O_WRONLY)
        new = self._files[path] = _File(about.st_ino if about else 0, 0, handle, 1, opening, create)
        return new

    def found(self, path: str) -> None:
        """A file is there that was created before its folder was watched; it counts as closed until it changes."""
        about = self._look(path)
        if path in self._files:
            return
        if about and stat.S_ISLNK(about.st_mode):
            self.created(path)
            return
        file = self._begin(path, about, opening=False)
        self._grown(path, file)
        file.close = self._calls.add("close", path, handle=file.handle, size=file.size)

    def moved_in(self, path: str) -> None:
        """A file was moved here from outside of the bucket, maybe in place of another."""
        about, known = self._look(path), self._files.get(path)
        if about and known and known.inode == about.st_ino:
            return  # It was found before.
        self._forget(path)
        self.found(path)

    def _known(self, path: str) -> _File:
        if path not in self._files:
            self.found(path)
        return self._files.get(path) or _File(0, 0)

    def opened(self, path: str) -> None:
        """A file was opened."""
        file = self._known(path)
        if file.opening:
            file.opening = False
            return
        handle = len(self._calls.all) + 1
        call = self._calls.add("open", path, handle=handle)
        file.opens.append(_Open(call, self._calls.add(_NOTHING, path, handle=handle)))

    def accessed(self, path: str) -> None:
        """A file was read."""
        file = self._known(path)
        for one in file.opens:
            if not one.read:
                one.read = True
                self._calls.amend(one.place, size=max(1, self._size(path, file)))

    def modified(self, path: str) -> None:
        """A file was written to, cut or extended."""
        file = self._known(path)
        if file.close is not None:
            self._calls.amend(file.close, name=_NOTHING, size=0)
            file.close = None
        elif file.handle < 0 and file.opens:
            one = file.opens.pop()
            self._calls.amend(one.call, flags=os.O_RDWR)
            file.handle, file.writers, file.written = self._calls.all[one.call].handle, 1, False
            file.again.append(_Again(path, one.call, file.size))
        elif file.handle < 0:  # Emptied by an open, of which some kernels tell later.
            file.handle = len(self._calls.all) + 1
            call = self._calls.add("open", path, handle=file.handle, flags=os.O_WRONLY | os.O_TRUNC)
            file.again.append(_Again(path, call, file.size, emptied=True))
            file.size, file.writers, file.written, file.opening = 0, 1, False, True
            return
        self._grown(path, file)

    def _size(self, path: str, file: _File) -> int:
        about = self._look(path)
        if about and not file.inode:
            file.inode = about.st_ino
        return about.st_size if about and about.st_ino == file.inode else file.size

    def _grown(self, path: str, file: _File) -> None:
        size, last = self._size(path, file), self._calls.all[file.write] if file.write is not None else None
        again = file.again[-1] if file.again else None
        if again:
            again.size, again.emptied = size, again.emptied or size < again.before
        if not file.written or last is None:
            file.write = self._calls.add("write", path, handle=file.handle, size=size)
            file.written = True
            if again and again.write is None:
                again.write = file.write
        elif size < file.size:
            self._calls.add("truncate", path, handle=file.handle, size=size)
            file.written = False
        elif size > file.size and time.monotonic() - last.time > _ANOTHER_WRITE_S:
            file.write = self._calls.add("write", path, handle=file.handle, offset=file.size, size=size - file.size)
        else:
            self._calls.amend(last.number, size=max(last.size, size - last.offset))
        file.size = size

    def closed(self, path: str, *, writable: bool) -> None:
        """A file that was opened for writing, or for reading alone, was closed for the last time."""
        file = self._known(path)
        if not writable:
            if file.opens:
                self._opened_only(file, file.opens.pop(0))
            return
        if file.close is not None:
            self._calls.amend(file.close, name=_NOTHING, size=0)
            file.close = None
        elif file.handle < 0:
            if file.opens:  # Nothing was written.
                self._calls.amend(file.opens.pop(0).call, flags=os.O_RDWR)
            return
        file.opening = False
        if file.written:
            self._grown(path, file)
        file.writers -= 1
        if file.writers <= 0 and not self.dying:
            self._calls.add("close", path, handle=file.handle, size=max(1, file.size))
            file.handle = -1

    def _opened_only(self, file: _File, one: _Open) -> None:
        if not one.read and file.size:
            self._calls.amend(one.place, name=MAPPED, size=file.size)

    def moved(self, old: str, new: str, *, is_folder: bool) -> None:
        """A file or folder got another name."""
        if is_folder:
            inside = [path for path in self._files if path.startswith(f"{old}/")]
            self._calls.add("rename", old, to=new)
            self._files.update({new + path[len(old) :]: self._files.pop(path) for path in inside})
            return
        file = self._files.pop(old, None)
        if file is None:
            self.found(new)
            return
        self._forget(new)
        self._calls.add("rename", old, to=new)
        self._files[new] = file
        if file.write is not None and file.handle < 0:
            self._settle(new, file)

    def deleted(self, path: str) -> None:
        """A file or folder is gone, or was moved out of the bucket."""
        for one in [path, *(found for found in self._files if found.startswith(f"{path}/"))]:
            if one in self._files:
                self._calls.add("unlink", one)
                self._forget(one)

    def _forget(self, path: str) -> None:
        file = self._files.pop(path, None)
        if file:
            self._tell(file)

    def _tell(self, file: _File) -> None:
        """Tell what is known only now: what was opened for reading, and whether a file was appended to or rewritten.

        No event tells that an open empties a file. One that has never shrunk may have been appended to.
        """
        if file.opening and file.create is not None and not file.again:
            self._calls.amend(file.create, name="symlink", handle=0, flags=0)
        while file.opens:
            self._opened_only(file, file.opens.pop())
        for one in file.again:
            if one.write is None:
                continue
            if all(other.grew for other in file.again) and not naming.looks_like_checkpoint(one.path):
                self._calls.amend(
                    one.write, offset=one.before, size=max(0, self._calls.all[one.write].size - one.before)
                )
            else:
                self._calls.amend(one.open, flags=os.O_WRONLY | os.O_TRUNC)

    def _settle(self, path: str, file: _File) -> None:
        """Correct the size that is known of a file."""
        size = self._size(path, file)
        if file.write is not None and size != file.size:
            last = self._calls.all[file.write]
            self._calls.amend(file.write, size=max(0, size - last.offset))
            file.size = size
            if file.again:
                file.again[-1].size = size

    def finish(self) -> None:
        """Nobody has a file open any more."""
        for path, file in list(self._files.items()):
            self._settle(path, file)
            self._tell(file)
