"""The bucket behind a mount of an object store: a file arrives there whole, at its close or later. Part of the daemon.

The machine sees the view: a folder on its own disk, of hard links to the bucket's files. A file gets an inode of its
own when it is opened for writing, and is linked into the bucket when it is uploaded. What was not, goes with the
machine.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

from skyspot.rehearsal import naming
from skyspot.rehearsal.bucketfs.manners import Manners
from skyspot.rehearsal.bucketfs.recorder import Recorder

_BURST_S = 0.5


class Store:
    """The view of one bucket, and its uploads."""

    def __init__(self, bucket: Path, disk: Path, manners: Manners, recorder: Recorder) -> None:
        """Build the view.

        Args:
            bucket: The folder that outlives the machine.
            disk: A folder of the machine's, on the bucket's file system.
            manners: The kind of mount.
            recorder: Told of each upload that is later than the close.
        """
        self.view, self._spare = disk / "view", disk / "upload"
        self._bucket, self._manners, self._recorder = bucket, manners, recorder
        self._changed = threading.Condition()
        self._names = itertools.count()
        self._waiting: dict[str, float] = {}
        """When the upload of a closed file is over, by path (monotonic seconds)."""
        shutil.rmtree(disk, ignore_errors=True)
        self._spare.mkdir(parents=True)
        shutil.copytree(bucket, self.view, symlinks=True, copy_function=_link)
        if manners.upload_after_s is not None:
            threading.Thread(target=self._upload_later, daemon=True).start()

    def opened(self, path: str, *, empty: bool) -> None:
        """Prepare a file to be opened for writing: its upload is off; an emptied one gets an inode of its own."""
        self._forget(path)
        place = self.view / path
        found = place.stat()
        if empty and found.st_nlink > 1:
            fresh = self._fresh()
            fresh.touch()
            fresh.chmod(found.st_mode & 0o7777)
            fresh.replace(place)

    def changed(self, path: str, *, linked: bool) -> None:
        """Prepare for a change of an open file: its upload is off, and what was uploaded stays as it is.

        Args:
            path: The file.
            linked: Whether the bucket has the same inode.
        """
        if self._waiting:
            self._forget(path)
        if not linked:
            return
        with suppress(FileNotFoundError):
            fresh = self._fresh()
            shutil.copy(self._bucket / path, fresh)
            fresh.replace(self._bucket / path)

    def closed(self, path: str) -> None:
        """Upload a file that was written and closed, or have it uploaded later."""
        if self._manners.upload_after_s is None:
            self._upload(path)
            return
        with suppress(FileNotFoundError), self._changed:
            needs_s = (
                self._manners.upload_after_s + (self.view / path).stat().st_size / self._manners.upload_bytes_per_s
            )
            self._waiting[path] = time.monotonic() + needs_s
            self._changed.notify()

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder: copy, then delete; a folder file by file."""
        pairs = self._pairs(old, new)
        (self.view / old).rename(self.view / new)
        for source, target in pairs:
            self._copy(source, target)
            (self._bucket / source).unlink(missing_ok=True)
        if (self._bucket / old).is_dir() and not (self._bucket / old).is_symlink():
            (self._bucket / new).mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._bucket / old)

    def rename_half(self, old: str, new: str) -> None:
        """Leave a rename in its middle: a file is there under both names, a folder's first half is moved."""
        pairs = self._pairs(old, new)
        if len(pairs) == 1:
            self._copy(*pairs[0])
        for source, target in pairs[: len(pairs) // 2]:
            self._copy(source, target)
            (self._bucket / source).unlink(missing_ok=True)

    def unlink(self, path: str) -> None:
        """Delete a file, and its upload."""
        self._forget(path)
        (self.view / path).unlink()
        (self._bucket / path).unlink(missing_ok=True)

    def mkdir(self, path: str, mode: int) -> None:
        """Make a folder; a cached mount knows folders only by their files."""
        (self.view / path).mkdir(mode)
        if self._manners.upload_after_s is None:
            (self._bucket / path).mkdir(parents=True, exist_ok=True)

    def rmdir(self, path: str) -> None:
        """Delete an empty folder."""
        (self.view / path).rmdir()
        with suppress(OSError):
            (self._bucket / path).rmdir()

    def symlink(self, path: str, target: str) -> None:
        """Make a symbolic link."""
        (self.view / path).symlink_to(target)
        (self._bucket / path).symlink_to(target)

    def finish(self) -> None:
        """Upload what waits, as SkyPilot does when the script has ended."""
        while burst := self._burst():
            for path in burst:
                self._upload_waiting(path)

    def _forget(self, path: str) -> None:
        with self._changed:
            self._waiting.pop(path, None)

    def _fresh(self) -> Path:
        return self._spare / str(next(self._names))

    def _put(self, source: Path, path: str) -> None:
        """Have a file in the bucket, whole and at once."""
        fresh, target = self._fresh(), self._bucket / path
        _link(source, fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.replace(target)
        fresh.unlink(missing_ok=True)  # It stays if both were the same file.

    def _pairs(self, old: str, new: str) -> list[tuple[str, str]]:
        """List the files of a rename, by their old and new paths."""
        if not (self.view / old).is_dir() or (self.view / old).is_symlink():
            return [(old, new)]
        found: list[str] = []
        for root, _, names in os.walk(self.view / old):
            found += [f"{root[len(str(self.view / old)) + 1 :]}/{name}".lstrip("/") for name in names]
        return [(f"{old}/{name}", f"{new}/{name}") for name in sorted(found)]

    def _copy(self, old: str, new: str) -> None:
        """Give an object a second name; an upload that waits goes to the new one."""
        with self._changed:
            due = self._waiting.pop(old, None)
            self._waiting.pop(new, None)
            if due is not None:
                self._waiting[new] = due
                self._changed.notify()
        with suppress(FileNotFoundError):
            self._put(self._bucket / old, new)

    def _upload(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._put(self.view / path, path)

    def _upload_waiting(self, path: str) -> None:
        def do() -> None:
            with self._changed:
                waits = self._waiting.pop(path, None)
            if waits is not None:
                self._upload(path)

        try:
            size = (self.view / path).stat().st_size
        except FileNotFoundError:
            size = 0
        self._recorder.change(do, "upload", path, (0, ""), size=size)

    def _upload_later(self) -> None:
        while True:
            with self._changed:
                burst = self._burst()
                left_s = self._waiting.get(burst[0], 0.0) - time.monotonic() if burst else None
                if left_s is None or left_s > 0:
                    self._changed.wait(left_s)
                    continue
            for path in burst:
                self._upload_waiting(path)

    def _burst(self) -> list[str]:
        """The files to upload next, those of one save that were closed at about the same time: the last one first.

        Uploads run side by side, and any of them may be over first. This order is the hardest for a script that writes
        its marker file last. A burst ends where a new save begins: a strike before an upload would otherwise leave a
        whole save that is newer than the one it strikes, and prove nothing.
        """
        with self._changed:
            burst: dict[str, str] = {}
            for path in sorted(self._waiting, key=self._waiting.__getitem__):
                kind = naming.kind_in_a_save(path)
                if kind in burst or self._waiting[path] > self._waiting[next(iter(burst.values()), path)] + _BURST_S:
                    break
                burst[kind] = path
            return [*reversed(burst.values())]


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file; copy it if the file system has no links, or too many."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
