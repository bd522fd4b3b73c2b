"""The samples that a run trains on, and this rank's micro-steps of a step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from trainer.errors import RunError
from trainer.training import rng
from trainer.training.order import micro_steps, step_ids
from trainer.training.training_state import TrainingState


class Samples(Protocol):
    """A map-style data set that makes its own batches."""

    def __len__(self) -> int:
        """The number of samples."""

    def batch(self, ids: np.ndarray[Any, Any]) -> Any:
        """The samples of these ids as a tree of tensors, on the CPU.

        Random numbers may be drawn from random, numpy.random or torch: they are seeded for the micro-step.
        """

    def weight(self, batch: Any) -> float:
        """The number of terms in the sum of losses over this batch (tokens, or samples), or their total weight."""


@dataclass(frozen=True)
class MicroStep:
    """One micro-step of one rank."""

    index: int
    """Its number in the step, from 0."""
    ids: np.ndarray[Any, Any]
    batch: Any
    weight: float
    """0 for a rank that has no samples left: it runs the micro-step only to join the collectives."""


class Loader:
    """Makes this rank's micro-steps, and keeps those of the next step."""

    def __init__(self, samples: Samples, state: TrainingState, rank: int, world_size: int) -> None:
        self._samples, self._state = samples, state
        self._rank, self._world_size = rank, world_size
        self._fetched: dict[int, list[MicroStep]] = {}

    def forget(self) -> None:
        """Forget what was fetched: the micro-steps are cut anew."""
        self._fetched = {}

    def fetch(self, step: int) -> list[MicroStep]:
        """This rank's micro-steps of a step (from 0)."""
        if step in self._fetched:
            return self._fetched[step]
        state = self._state
        ids = step_ids(state.config.seed, len(self._samples), state.config.global_batch_size, step, state.offset)
        parts = micro_steps(ids, state.micro_batch_size)
        mine = []
        for first in range(0, len(parts), self._world_size):
            index = first + self._rank
            part = parts[index] if index < len(parts) else parts[0]
            # Whoever loads it, and whenever: the next step's samples are fetched in this one.
            with rng.set_aside_on_host():
                rng.seed_host(rng.micro_step_seed(state.config.seed, step, index))
                batch = self._samples.batch(part)
            weight = weigh(self._samples, batch) if index < len(parts) else 0.0
            mine.append(MicroStep(index, part, batch, weight))
        self._fetched = {key: value for key, value in self._fetched.items() if key >= step}
        self._fetched[step] = mine
        return mine


def weigh(samples: Samples, batch: Any) -> float:
    """The weight of a batch.

    Raises:
        RunError: the weight is not a number, or is negative.
    """
    weight = samples.weight(batch)
    with suppress(TypeError, ValueError):
        number = float(weight)
        if math.isfinite(number) and number >= 0:
            return number
    raise RunError(f"{type(samples).__name__}.weight() returned {weight!r}; it must return a number >= 0")


def to_device(batch: Any, device: torch.device) -> Any:
    """A tree of tensors, on the device. Each container keeps its type and its other attributes.

    An object with a method `to` of its own (a BatchEncoding, a graph) moves itself.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return moved
        kept = copy.copy(batch)
        kept.update(moved)
        return kept
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        made = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(made, field.name, to_device(getattr(batch, field.name), device))  # It may be frozen.
        return made
    return batch
