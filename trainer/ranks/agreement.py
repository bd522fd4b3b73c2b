"""What the ranks tell each other at each micro-step, beside its computation, and what all conclude from it alike."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.attempt.ending import STOPS, Ending

KINDS = ("", *STOPS)
"""Why a rank asks for a stop, by the number that travels."""
MASK = (1 << 62) - 1
"""What a sum of fingerprints is cut to."""


@dataclass(frozen=True)
class Row:
    """What one rank tells the others at a micro-step."""

    stop: int = 0
    """Index into KINDS of the notice that this rank heard, or of the request that rank 0 found; 0: neither."""
    left_ms: int = 0
    """Until that notice's deadline."""
    superseded: int = 0
    """Rank 0: a newer attempt exists."""
    order: int = 0
    """Fingerprint of the samples of this micro-step."""
    rng: int = 0
    """Fingerprint of the generators' seeds of this micro-step."""
    round_ms: int = 0
    """Rank 0's time for a round of micro-steps."""
    save_ms: int = 0
    """Rank 0's time for a save; 0 where it has seen none."""
    save_every: int = 0
    """Rank 0: how many steps to leave between checkpoints."""
    weights: tuple[float, ...] = ()
    """Of this rank's micro-steps of the next step, in the last round of a step."""

    def to_ints(self) -> list[int]:
        """The row as it travels."""
        return [
            self.stop, self.left_ms, self.superseded, self.order, self.rng, self.round_ms, self.save_ms,
            self.save_every, *map(to_bits, self.weights),
        ]  # fmt: skip

    @classmethod
    def from_ints(cls, row: Sequence[int]) -> Row:
        """What `to_ints` gave."""
        count = len(dataclasses.fields(cls)) - 1
        return cls(*row[:count], weights=tuple(map(from_bits, row[count:])))


@dataclass(frozen=True)
class Stop:
    """An agreed stop, the same on all ranks."""

    kind: str
    """One of STOPS."""
    deadline: float
    """On this rank's monotonic clock."""

    @property
    def ending(self) -> Ending:
        """How the attempt ends."""
        return STOPS[self.kind]


def to_bits(value: float) -> int:
    """A float as an integer of the same bits: how a loss travels in a row."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def from_bits(bits: int) -> float:
    """What `to_bits` was given."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def exact_sum(weights: Iterable[float]) -> int | float:
    """The sum of weights, rounded once: the same in whatever order; a whole number as such."""
    total = math.fsum(weights)
    return int(total) if total.is_integer() else total
