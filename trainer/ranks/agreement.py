"""The integers that each rank sends to all others: about stopping and saving, and about its micro-step."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.attempt.ending import STOPS, Ending

KINDS = ("", *STOPS)
"""The reasons for which a rank asks for a stop; a row has the index."""


@dataclass(frozen=True)
class Message:
    """One rank's part in the agreement about stopping and saving."""

    stop: int = 0
    """Index into KINDS of the notice that this rank got, or of the reason that rank 0 found in the bucket; 0: none."""
    left_ms: int = 0
    """Milliseconds until its deadline."""
    age_ms: int = 0
    """Milliseconds since this rank heard of it."""
    round_ms: int = 0
    """Milliseconds that a micro-step took on rank 0; 0 before the first one has ended."""
    save_ms: int = 0
    """Milliseconds that a save took on rank 0; 0 before the first save."""
    save_every: int = 0
    """Rank 0: the number of steps between checkpoints."""
    enough: int = 0
    """1 if the program has ended training early on this rank."""
    save_now: int = 0
    """1 if the cloud expects to take this rank's machine: the next boundary is saved, and training goes on."""

    def to_ints(self) -> list[int]:
        """Return it as integers, for an exchange."""
        return list(dataclasses.astuple(self))


MESSAGE_INTS = len(dataclasses.fields(Message))
"""The number of a message's integers, with which each row begins."""


@dataclass(frozen=True)
class Row:
    """What a row says about a micro-step, after the message."""

    order: int = 0
    """Fingerprint of the samples of this micro-step."""
    rng: int = 0
    """Fingerprint of the generators' seeds of this micro-step."""
    weights: tuple[float, ...] = ()
    """In the last round of a step: the weights of this rank's micro-steps of the next step."""

    def to_ints(self) -> list[int]:
        """Return the row as integers, for an exchange."""
        return [self.order, self.rng, *map(to_bits, self.weights)]

    @classmethod
    def from_ints(cls, row: Sequence[int]) -> Row:
        """Return the row that `to_ints` was called on."""
        return cls(row[0], row[1], tuple(map(from_bits, row[2:])))


@dataclass(frozen=True)
class Stop:
    """An agreed stop, the same on all ranks."""

    kind: str
    """One of STOPS."""
    deadline: float
    """On this rank's monotonic clock."""
    heard_at: float
    """When the rank whose notice counts heard of it, on this rank's monotonic clock."""

    @property
    def ending(self) -> Ending:
        """Return how the attempt ends."""
        return STOPS[self.kind]


def to_bits(value: float) -> int:
    """Return an integer with the bits of a float, so that a loss fits into a row."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def from_bits(bits: int) -> float:
    """Return the float that `to_bits` was given."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def exact_sum(weights: Iterable[float]) -> int | float:
    """Return the sum of weights, rounded once, so that their order does not matter; an int if it is a whole number."""
    total = math.fsum(weights)
    return int(total) if total.is_integer() else total
