"""How long a run is long enough for its preemptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from skyspot.rehearsal.saves import Learnt, Save


@dataclass(frozen=True)
class Pace:
    """How far an undisturbed run goes, and how often it saves."""

    unit: str
    """steps, epochs or saves."""
    total: int
    """How many it makes; 0: it has records, and none with a loss."""
    every: int | None
    """How many from one save to the next; None: not known."""


def pace(learnt: Learnt | None) -> Pace | None:
    """The pace of a run without records, from its saves; None if it makes fewer than two."""
    saves = learnt.saves if learnt else ()
    if len(saves) < 2:
        return None
    if all(save.step is not None for save in saves):
        steps = [save.step or 0 for save in saves]
        return Pace("steps", steps[-1], _usual_gap(steps))
    if all(_is_epoch(save) for save in saves):
        gap = _usual_gap([save.numbers[0] for save in saves])
        return Pace("epochs", len(saves) * gap, gap)
    return Pace("saves", len(saves), 1)


def _usual_gap(numbers: Sequence[int]) -> int:
    gaps = sorted(after - before for before, after in pairwise(numbers))
    return max(1, gaps[len(gaps) // 2])


def _is_epoch(save: Save) -> bool:
    return len(save.numbers) == 1 and save.label.startswith(("ep ", "epoch "))


def too_short(had: int, wanted: int, *, known: Pace | None, seconds: float, written_s: float) -> str:
    """Say that a run was over before all preemptions, and what would be long enough.

    Two saves for each preemption are enough. If nothing is known of them, it is twice as long as this pace tells.

    Args:
        had: The number of preemptions.
        wanted: The number that was planned.
        known: The pace of the undisturbed run; None if that is not known.
        seconds: Duration of the undisturbed run.
        written_s: Its duration after its first write to the bucket; 0 if it never wrote.
    """
    if known and not known.total:
        return "no step logged a loss, which tells where to strike: call `run.log(loss=loss)` in the loop"
    over = f"it ended after {had} of {wanted} preemptions"
    fewer = f"; or ask for fewer: --preemptions {had}" if had else ""
    scale = (wanted + 1) / (had + 1)
    if known and known.every:
        needed = math.ceil(max(2 * wanted * known.every, known.total * scale))
        saves = f"it makes {known.total}" if known.unit == "saves" else f"its saves come every {known.every}"
        return f"{over}: {needed} {known.unit} are enough, {saves}{fewer}"
    if known:
        return f"{over}: {math.ceil(2 * known.total * scale)} {known.unit} are enough, it has {known.total}{fewer}"
    needed_s = math.ceil(max(2 * wanted, 2 * seconds * scale))
    began = f", {seconds - written_s:.1f} s of them before its first write to the bucket" if written_s else ""
    return f"{over}: it takes {seconds:.1f} s{began}; {needed_s} s are enough{fewer}"
