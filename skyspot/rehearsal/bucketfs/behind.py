"""Writes that are answered before they are done, so that the script goes on meanwhile. Part of the daemon.

They are done one after another, in the order in which they were answered, and any other call waits for them. So a kill
leaves what one that comes a moment earlier leaves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

_MOST = 16
"""How many writes can wait: of a MiB each at most."""


class WriteBehind:
    """A queue of writes, and the thread that does them."""

    def __init__(self) -> None:
        """Start the thread."""
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(_MOST):
            self._room.put(None)
        self._putting = threading.Lock()
        self._put = self._done = 0
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether a write is not done yet."""
        return self._put != self._done

    def put(self, write: Callable[[], None]) -> None:
        """Have a write done after all earlier ones; it must not raise. Waits while too many wait."""

        def do() -> None:
            write()
            self._room.put(None)

        self._room.get()
        self._add(do)

    def settle(self) -> None:
        """Wait until all writes so far are done."""
        if self.busy:
            over = threading.Lock()
            over.acquire()
            self._add(over.release)
            over.acquire()

    def _add(self, do: Callable[[], None]) -> None:
        with self._putting:
            self._put += 1
            self._queue.put(do)

    def _work(self) -> None:
        while True:
            self._queue.get()()
            self._done += 1
