"""Hangs: where training stands still for too long, each rank keeps the stacks of its threads, and the attempt ends.

Training shows that it lives whenever the ranks exchange a row and whenever a batch is handed out. Nothing is watched
before the first step has ended, while a save or a stop holds training up, and after the last step: each of those has
limits of its own. With several ranks, those that wait for one that stands still give up first: then all keep their
stacks.
"""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trainer.errors import one_line

LOOK_S = 1.0
SLOWEST = 3.0
"""Training may stand still for so many times as long as it ever has in this attempt, whatever the limit."""
DUMP_S = 10.0
"""The time that stacks may take to be written to the bucket."""
PATIENCE_S = 5.0
"""A rank leaves so much later than it finds the hang: the others find it too, and keep their own stacks."""


class HangGuard:
    """Watches this rank's training."""

    def __init__(self, limit_s: float, on_hang: Callable[[float], None]) -> None:
        """Prepare; `begin` starts the thread.

        Args:
            limit_s: Seconds in which training must show that it lives; 0: it is not watched.
            on_hang: Called on the guard's thread with the seconds for which it has not.
        """
        self._limit_s, self._on_hang = limit_s, on_hang
        self._first_at: float | None = None
        """When the first step began, as far as is known."""
        self._beat_at: float | None = None
        self._has_begun = False
        self._longest_s = 0.0
        self._keeping = threading.Lock()
        self._is_kept: bool | None = None
        """Whether the stacks are in the bucket, once a thread has tried to keep them."""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Watch from now on; how long the first step took counts as a time for which training stood still."""
        self._beat_at = now = time.monotonic()
        if not self._has_begun:
            self._has_begun, self._longest_s = True, now - (self._first_at or now)
        if self._limit_s and self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="hangs")
            self._thread.start()

    def beat(self) -> None:
        """Training lives; before `begin`, and after `rest`, this means nothing."""
        before, now = self._beat_at, time.monotonic()
        if not self._has_begun:
            self._first_at = self._first_at or now
        if before is not None:
            self._longest_s, self._beat_at = max(self._longest_s, now - before), now

    def rest(self) -> None:
        """Do not watch until the next `begin`."""
        self._beat_at = None

    @property
    def still_s(self) -> float:
        """Seconds for which training has not shown that it lives, in the first step too; 0 at rest."""
        at = self._beat_at if self._has_begun else self._first_at
        return 0.0 if at is None else time.monotonic() - at

    def keep_stacks(self, path: Path, error: BaseException | None = None) -> bool:
        """Keep the stacks, once for all threads that ask for it; as of the function `keep_stacks`."""
        with self._keeping:
            if self._is_kept is None:
                self._is_kept = keep_stacks(path, error)
            return self._is_kept

    def end(self) -> None:
        """End the thread."""
        self._over.set()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(min(LOOK_S, self._limit_s / 4)):
            now, at = time.monotonic(), self._beat_at
            if now - looked > 10 * LOOK_S:
                self.beat()  # This process itself was stopped meanwhile.
            elif at is not None and now - at > max(self._limit_s, SLOWEST * self._longest_s):
                self._on_hang(now - at)
                return
            looked = now


def keep_stacks(path: Path, error: BaseException | None = None) -> bool:
    """Write the stacks of all threads to a file in the bucket; True if that was done in time.

    Args:
        path: The file.
        error: What ended training on this thread, whose stack no longer shows where that was.
    """
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    if error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        text += f"\n{one_line(error)} (most recent call last):\n{frames}"
    sys.stderr.write(text)
    done = threading.Event()

    def write() -> None:
        with suppress(OSError):
            path.write_text(text)
            done.set()

    threading.Thread(target=write, daemon=True, name="stacks").start()
    return done.wait(DUMP_S)
