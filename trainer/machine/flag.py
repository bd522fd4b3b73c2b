"""Flag: an event that a signal handler may set, whatever the main thread does at that moment.

`threading.Event.set` takes a lock. A handler that runs while its own thread holds that lock, in `wait` or in the `set`
of another handler, waits for ever. `queue.SimpleQueue.put` may interrupt itself and `get`:
https://docs.python.org/3/library/queue.html#queue.SimpleQueue.put
"""

from __future__ import annotations

import queue


class Flag:
    """Not set at first; once set, it stays so."""

    def __init__(self) -> None:
        self._is_set = False
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()

    def is_set(self) -> bool:
        """Whether it has been set."""
        return self._is_set

    def set(self) -> None:
        """Set it, and wake all who wait."""
        self._is_set = True
        self._woken.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, for so many seconds at most; returns whether it is set."""
        if not self._is_set:
            try:
                self._woken.get(timeout=timeout)
            except queue.Empty:
                pass
            else:
                self._woken.put(None)  # For the next who waits.
        return self._is_set
