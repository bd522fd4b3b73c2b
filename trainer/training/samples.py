"""The samples that a run trains on, and this rank's micro-steps of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from trainer.errors import RunError
from trainer.training.config import RunConfig
from trainer.training.order import micro_steps, step_ids


class Samples(Protocol):
    """A map-style data set that makes its own batches."""

    def __len__(self) -> int:
        """The number of samples."""

    def batch(self, ids: np.ndarray[Any, Any]) -> Any:
        """The samples of these ids as a tree of tensors, on the CPU; a pure function of the ids."""

    def weight(self, batch: Any) -> float:
        """How many terms the sum of losses over this batch has (tokens, or samples), or what they weigh group."""


@dataclass(frozen=True)
class MicroStep:
    """One micro-step of one rank."""

    index: int
    """Its number in the step, from 0."""
    ids: np.ndarray[Any, Any]
    batch: Any
    weight: float
    """0 where the rank only keeps the others company."""


class Loader:
    """Makes this rank's micro-steps, and keeps those of the step that comes next."""

    def __init__(self, samples: Samples, config: RunConfig, rank: int, world_size: int) -> None:
        self._samples, self._config = samples, config
        self._rank, self._world_size = rank, world_size
        self._fetched: dict[int, list[MicroStep]] = {}

    def fetch(self, step: int, offset: int) -> list[MicroStep]:
        """This rank's micro-steps of a step; see `order.step_ids` for `offset`."""
        if step in self._fetched:
            return self._fetched[step]
        config = self._config
        ids = step_ids(config.seed, len(self._samples), config.global_batch_size, step, offset)
        parts = micro_steps(ids, config.micro_batch_size)
        mine = []
        for first in range(0, len(parts), self._world_size):
            index = first + self._rank
            part = parts[index] if index < len(parts) else parts[0]
            batch = self._samples.batch(part)
            weight = weigh(self._samples, batch) if index < len(parts) else 0.0
            mine.append(MicroStep(index, part, batch, weight))
        self._fetched = {key: value for key, value in self._fetched.items() if key >= step}
        self._fetched[step] = mine
        return mine


def weigh(samples: Samples, batch: Any) -> float:
    """The weight of a batch.

    Raises:
        RunError: it is no number, or below 0.
    """
    weight = samples.weight(batch)
    with suppress(TypeError, ValueError):
        number = float(weight)
        if math.isfinite(number) and number >= 0:
            return number
    raise RunError(f"{type(samples).__name__}.weight() gave {weight!r}: it has to be a number, 0 or more")


def to_device(batch: Any, device: torch.device) -> Any:
    """A tree of tensors, on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
