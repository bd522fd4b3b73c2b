"""Parses and prints sizes, and counts the layers and tensors of a state. Standard library only."""

from __future__ import annotations

import argparse

MOST_LAYERS = 80
UNITS = {"GB": 10**9, "MB": 10**6}


def size(text: str) -> int:
    """Parse a size such as `1GB` or `250MB` into bytes."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 1GB or 250MB") from None


def shown(count: float) -> str:
    """Format a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def layers(state_bytes: int) -> int:
    """Number of layers: one for each megabyte, at most MOST_LAYERS."""
    return max(1, min(MOST_LAYERS, state_bytes // 10**6))


def tensor_count(state_bytes: int) -> int:
    """Number of tensors: each layer's weight and bias, and for each of these two moments and a step count."""
    return 4 * 2 * (layers(state_bytes) + 1)
