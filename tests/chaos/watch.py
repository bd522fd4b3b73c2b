"""Watches a store behind the mount while attempts run: once it holds a whole checkpoint, it must always hold one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import truth

LOOK_S = 0.01
Mark = frozenset[tuple[str, int, int, int]]
"""(name, inode, size, time) of each file in a folder; while these stay the same, nothing was written there."""


class Watch:
    """Looks every 10 ms, from the start of the first attempt to the end of the last one.

    While the checkpoint that was last found whole stays unchanged, a look is a few stat() calls. Otherwise it reads and
    hashes checkpoints until one is whole.
    """

    def __init__(self, behind: Path, run: int) -> None:
        self.wrong: str | None = None
        self._checkpoints, self._run_id = behind / "checkpoints", truth.run_id(run)
        self._whole: Path | None = None
        self._mark: Mark = frozenset()
        self._seen = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start watching, just before an attempt starts; what a fault damaged earlier is not held against it."""
        if self._thread is None:
            self._look()
            self._thread = threading.Thread(target=self._look_again, daemon=True)
            self._thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()

    def _look_again(self) -> None:
        while not self.wrong and not self._over.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        """Check that a whole checkpoint is there; look four times, because pruning may delete one during a look."""
        if self._there_is_one():
            self._seen = True
        elif self._seen and not any(self._there_is_one() for _ in range(3)):
            self.wrong = "for a moment no whole checkpoint was in the store"

    def _there_is_one(self) -> bool:
        if self._whole and _mark(self._whole) == self._mark:
            return True
        try:
            folders = sorted(self._checkpoints.iterdir(), reverse=True)
        except FileNotFoundError:
            return False
        for folder in folders:
            mark = _mark(folder)
            if truth.checkpoint(folder, self._run_id):
                self._whole, self._mark = folder, mark
                return True
        return False


def _mark(folder: Path) -> Mark:
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return frozenset()
    return frozenset((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)
