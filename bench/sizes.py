"""Sizes as a person writes them, and what is made of so many bytes of state. Standard library only."""

from __future__ import annotations

import argparse

MOST_LAYERS = 80
UNITS = {"GB": 10**9, "MB": 10**6}


def size(text: str) -> int:
    """Bytes of `1GB`, `250MB`."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: say 1GB, or 250MB") from None


def shown(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def layers(state_bytes: int) -> int:
    """One for each megabyte, and at most MOST_LAYERS."""
    return max(1, min(MOST_LAYERS, state_bytes // 10**6))


def tensor_count(state_bytes: int) -> int:
    """Tensors of a state: each layer's weight and bias, and of each of them two moments and a count of steps."""
    return 4 * 2 * (layers(state_bytes) + 1)
