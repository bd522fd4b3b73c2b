"""Waiting for a message with a time limit."""

import selectors


def readable(descriptor: int, seconds: float) -> bool:
    """Whether the descriptor has data, or is closed, within so many seconds."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, seconds)))
