"""Sizes as a person writes them."""

from __future__ import annotations

import argparse

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
