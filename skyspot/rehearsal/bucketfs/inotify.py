"""The file events of a folder on Linux: each folder below it is watched, too."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import inotify_simple
from inotify_simple import flags

from skyspot.rehearsal.bucketfs.calls import Calls
from skyspot.rehearsal.bucketfs.events import Events

_MASK = (
    flags.OPEN | flags.ACCESS | flags.MODIFY | flags.CLOSE_WRITE | flags.CLOSE_NOWRITE
    | flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO
    | flags.ONLYDIR | flags.EXCL_UNLINK
)  # fmt: skip
_PAIR_S = 0.1
"""The two events of a rename may have others between them."""
OVERFLOW = "the system's queue of file events overflowed (/proc/sys/fs/inotify/max_queued_events)"


@dataclass(frozen=True)
class _Listed:
    """What a folder held just after it was watched. What no event has told by then was there before."""

    folder: str
    watch: int
    names: tuple[tuple[str, bool], ...]
    """(name, it is a folder)."""
    deep: bool
    """What lies in it may have been missed, too."""


class Inotify:
    """Turns the events of one bucket into calls."""

    def __init__(self, bucket: Path, calls: Calls) -> None:
        """Begin with what the bucket holds now.

        Raises:
            OSError: the system has no more watches.
        """
        self._bucket, self._calls = bucket, calls
        self._inotify = inotify_simple.INotify()
        self._folders: dict[int, str] = {}
        """The path of each watched folder, by its watch: empty, or with a slash at its end."""
        self._queue: deque[inotify_simple.Event | _Listed] = deque()
        self._moving: dict[int, tuple[str, bool, float]] = {}
        """By cookie: a path that was moved away, whether it is a folder, and when."""
        try:
            for folder in self._below(""):
                self._watch(folder)
        except OSError:
            self._inotify.close()
            raise
        self._events = Events(bucket, calls)

    def _below(self, folder: str) -> Iterator[str]:
        yield folder
        for root, names, _ in os.walk(self._bucket / folder):
            for name in names:
                if not (Path(root) / name).is_symlink():
                    yield f"{(Path(root) / name).relative_to(self._bucket).as_posix()}/"

    def _watch(self, folder: str) -> int:
        watch: int = self._inotify.add_watch(self._bucket / folder, _MASK)
        self._folders[watch] = folder
        return watch

    def wait(self, seconds: float) -> None:
        """Wait until something has happened, at most for so long."""
        select.select([self._inotify], [], [], seconds)

    def look(self) -> None:
        """Take in what has happened."""
        self._queue += self._inotify.read(timeout=0)
        while self._queue:
            one = self._queue.popleft()
            if isinstance(one, _Listed):
                self._listed(one)
            else:
                self._take(one)
            if not self._queue:
                self._queue += self._inotify.read(timeout=0)
        self._forget_moved(time.monotonic() - _PAIR_S)

    def kill_comes(self) -> None:
        """Take in what has happened before the machine is killed: that closes every file, whole or not."""
        self.look()
        self._events.dying = True

    def finish(self) -> None:
        """Take in the rest. The machine is gone."""
        self.look()
        self._forget_moved(time.monotonic())
        self._inotify.close()
        self._events.finish()

    # -- events ------------------------------------------------------------------------------------------------------

    def _take(self, event: inotify_simple.Event) -> None:
        mask = event.mask
        if mask & flags.Q_OVERFLOW:
            self._calls.gap(OVERFLOW)
        if mask & flags.IGNORED:
            self._folders.pop(event.wd, None)
        folder = self._folders.get(event.wd)
        if folder is None or not event.name:
            return
        path = f"{folder}{event.name}"
        if mask & flags.MOVED_FROM:
            self._moving[event.cookie] = path, bool(mask & flags.ISDIR), time.monotonic()
        elif mask & flags.MOVED_TO:
            self._moved(event.cookie, path, is_folder=bool(mask & flags.ISDIR))
        elif mask & flags.ISDIR:
            if mask & flags.CREATE:
                self._appeared(path)
        elif mask & flags.CREATE:
            self._events.created(path)
        elif mask & flags.DELETE:
            self._events.deleted(path)
        elif mask & flags.OPEN:
            self._events.opened(path)
        elif mask & flags.ACCESS:
            self._events.accessed(path)
        elif mask & flags.MODIFY:
            self._events.modified(path)
        elif mask & (flags.CLOSE_WRITE | flags.CLOSE_NOWRITE):
            self._events.closed(path, writable=bool(mask & flags.CLOSE_WRITE))

    def _appeared(self, folder: str, *, deep: bool = False) -> None:
        """Watch a new folder, and only then list it, so that no file is missed."""
        try:
            watch = self._watch(f"{folder}/")
            with os.scandir(self._bucket / folder) as found:
                names = tuple((one.name, one.is_dir(follow_symlinks=False)) for one in found)
        except (FileNotFoundError, NotADirectoryError):  # It is gone, or it or one above was renamed: an event tells.
            return
        except OSError as error:
            self._calls.gap(f"{folder} could not be watched: {error.strerror}")
            return
        self._queue += self._inotify.read(timeout=0)
        self._queue.append(_Listed(folder, watch, names, deep))

    def _listed(self, one: _Listed) -> None:
        if self._folders.get(one.watch) != f"{one.folder}/":
            return  # It was renamed, and is listed again.
        watched = set(self._folders.values())
        for name, is_folder in one.names:
            path = f"{one.folder}/{name}"
            if is_folder and (one.deep or f"{path}/" not in watched):
                self._appeared(path, deep=one.deep)
            elif not is_folder and os.path.lexists(self._bucket / path):
                self._events.found(path)

    def _moved(self, cookie: int, path: str, *, is_folder: bool) -> None:
        old = self._moving.pop(cookie, None)
        if old is None and is_folder:
            self._appeared(path, deep=True)
        elif old is None:
            self._events.moved_in(path)
        else:
            self._events.moved(old[0], path, is_folder=is_folder)
            for watch, folder in list(self._folders.items()) if is_folder else ():
                if folder.startswith(f"{old[0]}/"):
                    self._folders[watch] = path + folder[len(old[0]) :]
            if is_folder:
                self._appeared(path, deep=True)  # It may have been renamed before it could be watched.

    def _forget_moved(self, before: float) -> None:
        """What was moved away for so long has left the bucket."""
        for cookie, (path, is_folder, when) in list(self._moving.items()):
            if when <= before:
                del self._moving[cookie]
                self._events.deleted(path)
                for watch, folder in list(self._folders.items()) if is_folder else ():
                    if folder.startswith(f"{path}/"):
                        with suppress(OSError):  # It was deleted meanwhile.
                            self._inotify.rm_watch(watch)
