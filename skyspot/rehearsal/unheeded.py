"""Says which notices and signals a task ignored."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from skyspot.rehearsal.faults import WARNED
from skyspot.rehearsal.remedies import UNHEEDED
from skyspot.rehearsal.result import Leg, Row

_NAMES = {"aws": "AWS", "gcp": "Google Cloud", "azure": "Azure"}


def told(legs: Sequence[Leg], asked: Collection[str]) -> list[str]:
    """A line for each kind of notice or signal that the task ignored.

    Args:
        legs: The legs, over.
        asked: The clouds whose metadata service the task has asked for anything.
    """
    found: dict[str, str] = {}
    for row in (row for leg in legs for row in leg.rows):
        warned = WARNED.get(row.kind)
        if warned and not warned.signal and warned.cloud not in asked:
            found.setdefault(
                row.kind, f"the task does not ask {_NAMES[warned.cloud]}'s metadata service for its notice"
            )
        elif row.heard and (did := _did(row)):
            found.setdefault(row.heard, f"attempt {row.number} ignored its {WARNED[row.heard].label}: it {did}")
    return [f"{kind}: {text}. Remedy: {UNHEEDED.remedy}." for kind, text in found.items()]


def _did(row: Row) -> str:
    """What an attempt did instead of leaving; empty if it left, or if what was seen does not tell.

    One that makes a single save and waits to be killed is as good as one that leaves.
    """
    if row.exit_code not in (None, 0) or row.exited_early or row.saved_since is None:
        return ""
    if row.saved_since > 1:
        return "went on with its work"
    return "neither saved nor exited" if row.saved_since == 0 and row.struck else ""
