"""Waits: the part of a step's time in which rank 0 did not train."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Waits:
    """Seconds within a step's `step_s`."""

    save_s: float
    """For saves."""
    data_s: float | None
    """For samples; None: not measured."""

    def fields(self) -> dict[str, float]:
        """The waits for a line of metrics; without those that are not known, or too short to matter."""
        found = {"save_s": round(self.save_s, 5), "data_s": round(self.data_s or 0.0, 5)}
        return {name: seconds for name, seconds in found.items() if seconds > 0}
