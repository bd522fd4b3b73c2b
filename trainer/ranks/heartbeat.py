"""Heartbeats in the store: each rank has one thread and one connection for them, however many waits there are.

It does not open a connection for each wait: torch asks the name server for the other end's name, even on loopback, and
if that answer is lost, each connection takes five seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BEAT_S = 1.0


class Heartbeats:
    """Sends a heartbeat under each key that somebody waits for."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        """Prepare; the thread starts with the first heartbeat.

        Args:
            connect: Makes a connection to the store that nobody else uses; called on the thread.
        """
        self._connect = connect
        self._keys: set[str] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ends = False

    @contextmanager
    def sent(self, key: str) -> Iterator[None]:
        """A context in which a heartbeat is sent under `key`, at once and then every `BEAT_S`; then it is deleted."""
        with self._changed:
            self._keys.add(key)
            self._changed.notify()
            if not self._thread:
                self._thread = threading.Thread(target=self._send, daemon=True, name="heartbeat")
                self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._keys.discard(key)
                self._changed.notify()

    def end(self, seconds: float) -> None:
        """End the thread, and wait for that: a thread in a call of c10d's aborts the process when Python ends."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        if self._thread:
            self._thread.join(seconds)

    def _send(self) -> None:
        store, left = None, frozenset[str]()
        while not self._ends:
            with self._changed:
                self._changed.wait_for(lambda left=left: self._ends or self._keys or left)  # type: ignore[misc]
                keys = frozenset(self._keys)
            try:
                store = store or self._connect()
                for key in keys:
                    store.set(key, repr(time.monotonic()))
                for key in left - keys:  # Only this thread deletes, so that nobody sets the key again afterwards.
                    store.delete_key(key)
                left = keys
            except Exception:  # A dead store ends the attempt elsewhere.
                store, left = None, frozenset()
            with self._changed:
                self._changed.wait_for(lambda known=keys: self._ends or self._keys != known, BEAT_S)  # type: ignore[misc]
