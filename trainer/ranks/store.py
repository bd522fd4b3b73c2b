"""Reading and waiting for keys in the ranks' store, without the pitfalls of c10d's own calls."""

from __future__ import annotations

import time
from typing import Any

_NOTHING = "-"
"""A value that nobody writes under a key that is peeked at."""


def peek(store: Any, key: str) -> bytes:
    """Return the value of a key that its writer may delete at any moment; empty if there is none.

    A `get` after a `check` would block if the key is deleted between the two.
    """
    found: bytes = store.compare_set(key, _NOTHING, _NOTHING)
    return b"" if found == _NOTHING.encode() else found


def wait_for(store: Any, key: str, seconds: float) -> bool:
    """True if the key appears in the store within `seconds`.

    Polls instead of calling the store's own `wait`, because c10d prints a warning each time a `wait` times out.
    """
    end, pause = time.monotonic() + seconds, 0.001
    while not store.check([key]):
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, pause))
        pause = min(0.05, 2 * pause)
    return True
