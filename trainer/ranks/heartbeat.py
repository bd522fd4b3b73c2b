"""Signs of life in the store: one thread and one connection a rank, however many waits there are.

A connection is not made for each: torch asks the name server who is at the other end, loopback included, and where that
answer is lost, each connection takes five seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BEAT_S = 1.0


class Heart:
    """Leaves a sign of life under each key that somebody waits for."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        """Make one that has not begun yet.

        Args:
            connect: Makes a connection to the store that nobody else uses; called on the thread.
        """
        self._connect = connect
        self._keys: set[str] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextmanager
    def beating(self, key: str) -> Iterator[None]:
        """A context in which a heartbeat goes out under `key`, at once and then every `BEAT_S`; it is deleted then."""
        with self._changed:
            self._keys.add(key)
            self._changed.notify()
            if not self._thread:
                self._thread = threading.Thread(target=self._beat, daemon=True, name="heart")
                self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._keys.discard(key)
                self._changed.notify()

    def _beat(self) -> None:
        store, left = None, frozenset[str]()
        while True:
            with self._changed:
                self._changed.wait_for(lambda left=left: self._keys or left)
                keys = frozenset(self._keys)
            try:
                store = store or self._connect()
                for key in keys:
                    store.set(key, repr(time.monotonic()))
                for key in left - keys:  # By this thread alone: nobody sets it again behind its back.
                    store.delete_key(key)
                left = keys
            except Exception:  # A dead store ends the attempt elsewhere.
                store, left = None, frozenset()
            with self._changed:
                self._changed.wait_for(lambda known=keys: self._keys != known, BEAT_S)
