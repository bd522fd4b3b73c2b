"""Fit: what fits before the deadline of a stop, from numbers that all ranks have."""

from __future__ import annotations

from dataclasses import dataclass

SAVE_FACTOR = 1.5
"""The last save may take so much longer than the one before."""
UNKNOWN_SAVE = 0.5
"""The part of the time left that is kept for a save, before any save has shown how long one takes."""


@dataclass(frozen=True)
class Fit:
    """The time left in the middle of a step, and what the rest of the step and a save take. The same on all ranks."""

    left_s: float
    """Seconds until the deadline."""
    rounds_left: int
    """Micro-steps until the end of the step."""
    round_s: float
    """Seconds that a micro-step takes; 0 if none has been measured."""
    save_s: float
    """Seconds that a save takes; 0 if none has been measured."""

    @property
    def rest_s(self) -> float:
        """Seconds that the rest of the step takes."""
        return self.rounds_left * self.round_s

    @property
    def fits(self) -> bool:
        """True if the rest of the step and a save fit before the deadline. Without a known speed it does not."""
        save_s = SAVE_FACTOR * self.save_s or UNKNOWN_SAVE * self.left_s
        return self.round_s > 0 and self.rest_s + save_s < self.left_s

    def line(self, kind: str, step: int) -> str:
        """Return the line that tells the decision and its numbers.

        Args:
            kind: The stop's.
            step: The number of the step that is under way, from 1.
        """
        decision = f"finishing step {step} first" if self.fits else f"dropping the micro-steps of step {step}"
        rest, save = _seconds(self.round_s and self.rest_s), _seconds(self.save_s)
        return f"{kind}: {self.left_s:.1f} s left; the rest of the step takes {rest}, a save {save}: {decision}"


def save_line(kind: str, left_s: float, save_s: float, step: int, under_way: int | None) -> str:
    """Return the line that tells what is saved at a stop, and how much time is left for it.

    Args:
        kind: The stop's.
        left_s: Seconds until the deadline.
        save_s: Seconds that a save takes; 0 if none has been measured.
        step: The boundary's.
        under_way: The step whose save is under way, if one is.
    """
    first = "" if under_way in (None, step) else f"waiting for the save of step {under_way}, then "
    saving = "waiting for the save of" if under_way == step else "saving"
    return f"{kind}: {left_s:.0f} s left, a save takes {_seconds(save_s)}; {first}{saving} step {step}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds else "an unknown time"
