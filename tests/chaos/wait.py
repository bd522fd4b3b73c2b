"""Waiting for a message with a time limit."""

import selectors


def readable(descriptor: int, seconds: float) -> bool:
    """Wait for the descriptor to have data or be closed; False after so many seconds without either."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(max(0.0, seconds)))
