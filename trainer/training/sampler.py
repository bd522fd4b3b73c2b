"""The sampler: the same samples in each step of a user's loop, on any number of processes.

The order is a stream of epochs without end; a step takes the next samples of it, and may span two epochs. They are cut
into micro-batches; rank r of w has the micro-batches r, r + w, ... of each step. So it is for the trainer's own loop
(loop.py), with any order in the place of its permutations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from trainer.errors import RunError
from trainer.training import rng
from trainer.training.order import epoch_ids, fingerprint, item_seeds, order_seed

EPOCHS_KEPT = 3
"""Epochs of a given order that are kept: a loader reads ahead of the loop."""

Order = Callable[[int], "Sequence[int] | np.ndarray[Any, Any] | torch.Tensor"]
"""Epoch (from 0) -> the ids of its samples, in their order; as many as it likes, also the same one several times."""


@dataclass(frozen=True)
class Place:
    """A place in the order: so many samples of this epoch are taken, by all processes together."""

    epoch: int = 0
    taken: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """One batch of one rank."""

    first: int
    """Where it begins in the step, in samples."""
    ids: list[int]
    seeds: list[int]
    """Of each sample's random numbers; a function of (seed, epoch, place in the epoch)."""
    after: Place
    """Where the next step begins."""

    @property
    def fingerprint(self) -> int:
        """Of its samples; the sum over a step does not depend on how it is cut into micro-batches."""
        return fingerprint(np.array(self.ids, dtype=np.int64), self.first)


class RunSampler(Sampler[list[int]]):
    """The `batch_sampler` of a `DataLoader`, made by `SpotRun.sampler`."""

    def __init__(
        self,
        dataset: Any,
        global_batch_size: int,
        micro_batch_size: int | None,
        *,
        seed: int,
        shuffle: bool,
        order: Order | None,
        rank: int,
        world_size: int,
    ) -> None:
        """Describe the order; `SpotRun.sampler` says what the arguments mean.

        Raises:
            RunError: a value makes no sense.
        """
        self.n_samples, self.seed, self.global_batch_size = _length(dataset), seed, global_batch_size
        self._shuffle, self._rank, self._world_size = shuffle, rank, world_size
        self._ids = lru_cache(EPOCHS_KEPT)(lambda epoch: self._given(order, epoch)) if order else None
        self.micro_batch_size = _micro_batch_size(global_batch_size, micro_batch_size, world_size)
        self.accumulate = global_batch_size // (self.micro_batch_size * world_size)
        """Batches of a step."""
        self.place = Place()
        """What a checkpoint has consumed; set by `SpotRun.steps`."""

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches of about one epoch; `SpotRun.steps` asks for more than one."""
        return (batch.ids for batch in islice(self.micro_batches(self.place), len(self)))

    def __len__(self) -> int:
        """The batches of this rank in about one epoch: in as many steps as it takes to see each sample."""
        return -(-self.n_samples // self.global_batch_size) * self.accumulate

    def micro_batches(self, place: Place) -> Iterator[MicroBatch]:
        """Yield this rank's batches from a place on, without end."""
        size, stride = self.micro_batch_size, self._world_size
        while True:
            ids, seeds, place = self._take(place)
            for first in range(self._rank * size, self.global_batch_size, stride * size):
                part = slice(first, first + size)
                yield MicroBatch(first, ids[part].tolist(), seeds[part].tolist(), place)

    def _take(self, place: Place) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Place]:
        """The next step: (its samples, their seeds, where it ends)."""
        ids, seeds, missing = [], [], self.global_batch_size
        epoch, first = place.epoch, place.taken
        while missing:
            length = len(self._ids(epoch)) if self._ids else self.n_samples
            if first >= length:
                epoch, first = epoch + 1, 0
                continue
            last = min(length, first + missing)
            ids.append(self._entries(epoch, first, last))
            seeds.append(item_seeds(self.seed, epoch, first, last))
            missing, first = missing - (last - first), last
        return np.concatenate(ids), np.concatenate(seeds), Place(epoch, first)

    def _entries(self, epoch: int, first: int, last: int) -> np.ndarray[Any, Any]:
        if self._ids:
            return self._ids(epoch)[first:last]
        if self._shuffle:
            return epoch_ids(self.seed, self.n_samples, epoch, first, last)
        return np.arange(first, last, dtype=np.int64)

    def _given(self, order: Order, epoch: int) -> np.ndarray[Any, Any]:
        """The user's order of an epoch. What it draws is a function of the seed and the epoch.

        Raises:
            RunError: it is not a list of samples' ids.
        """
        with rng.seeded(order_seed(self.seed, epoch)):
            given = order(epoch)
        ids = np.asarray(given.cpu() if isinstance(given, torch.Tensor) else given)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise RunError(
                f"run.sampler(order=...): order({epoch}) must return the ids of an epoch's samples, at least 1"
            )
        if ids.min() < 0 or ids.max() >= self.n_samples:
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise RunError(
                f"run.sampler(order=...): order({epoch}) returned {wrong}; the data set has samples 0 to "
                f"{self.n_samples - 1}"
            )
        return ids.astype(np.int64)


def _length(dataset: Any) -> int:
    """The number of samples of a map-style data set.

    Raises:
        RunError: it has none, or no number.
    """
    try:
        length = len(dataset)
    except TypeError:
        length = None
    if length is None or not hasattr(dataset, "__getitem__"):
        raise RunError(
            f"run.sampler(): a {type(dataset).__name__} is not a map-style data set: it needs __len__ and __getitem__. "
            "Give a stream to run.steps() without a sampler"
        )
    if not length:
        raise RunError("run.sampler(): the data set is empty")
    return length


def _micro_batch_size(whole: int, micro: int | None, processes: int) -> int:
    """The samples of one batch of one process.

    Raises:
        RunError: a step does not consist of equal batches, as many on each process.
    """
    for name, value in (("global_batch_size", whole), ("micro_batch_size", 1 if micro is None else micro)):
        if not (type(value) is int and value > 0):
            raise RunError(f"run.sampler({name}={value!r:.60}): give a number of samples")
    if micro is None:
        if whole % processes:
            raise RunError(
                f"run.sampler(global_batch_size={whole}): {processes} processes cannot share it equally. Use a "
                f"multiple of {processes}, or another number of processes"
            )
        return whole // processes
    if whole % (micro * processes):
        counts = [count for count in range(1, whole // micro + 1) if whole % (micro * count) == 0]
        remedy = f"These numbers of processes do: {', '.join(map(str, counts))}" if counts else "Use a multiple of it"
        raise RunError(
            f"run.sampler(global_batch_size={whole}, micro_batch_size={micro}): {processes} processes do not get equal "
            f"numbers of whole batches. {remedy}"
        )
    return micro
