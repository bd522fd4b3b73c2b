"""The comparison of the driver's name of an accelerator with a rung's: one rule for the trainer and the report."""

from __future__ import annotations

import re
from itertools import pairwise

OTHER_NUMBER, OTHER_NAME, UNNAMED = -2, -1, 0


def likeness(machine: str, accelerator: str, per_node: int | None) -> int:
    """The number of parts of a rung's name, if all of them are words of the driver's name.

    The rung with the greatest number is meant: `NVIDIA A100-SXM4-80GB` has both parts of A100-80GB, and one of A100.
    Only whole words count, so an L40S is no L4. Two words may be one, as in RTX4090 and `RTX 4090`.

    Args:
        machine: What the rung asks for: `A100-80GB:8`, an instance type, or `CPU`.
        accelerator: The driver's name of one; empty: not known.
        per_node: The number in a node; None: not known.

    Returns:
        The number of parts. UNNAMED: the rung or the driver gives no name. OTHER_NAME, OTHER_NUMBER: they differ.
    """
    name, _, count = machine.partition(":")
    if per_node and count and count.removesuffix(".0") != str(per_node):
        return OTHER_NUMBER
    words = [word for word in re.split(r"[\s-]+", accelerator.lower()) if word]
    if not words or not count:
        return UNNAMED
    parts = name.lower().split("-")
    known = {*words, *(f"{one}{other}" for one, other in pairwise(words))}
    return len(parts) if known.issuperset(parts) else OTHER_NAME
