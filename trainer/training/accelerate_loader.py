"""The batches of a loader that accelerate has prepared, from the batch after a checkpoint's.

Such a loader reads one batch ahead, to know which one is the last, and may read for all ranks on rank 0
(`dispatch_batches`). So what a data set draws for a batch comes before the step on the batch before it. This module
keeps the random streams of that moment, and has the loader read through a `_Reader`, which begins at the right batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer.training import rng
from trainer.training.skipping import can_skip, skipping


@dataclass(frozen=True)
class Place:
    """Where a checkpoint was saved in an epoch."""

    consumed: int
    """Batches of this rank."""
    is_last: bool
    """The last of them ends the epoch."""
    ahead: torch.Tensor | None
    """The random streams before the next batch was read."""
    now: torch.Tensor
    """The random streams of the checkpoint."""


def is_prepared(loader: object) -> bool:
    """True for accelerate's `DataLoaderShard` and `DataLoaderDispatcher`."""
    return type(loader).__module__.startswith("accelerate.") and hasattr(loader, "base_dataloader")


def batches(
    loader: Any, place: Place | None, reads: Callable[[rng.Streams], None], report: Callable[[int, int], None]
) -> Iterator[Any]:
    """Yield the batches of an epoch, or those after a place in it.

    Args:
        loader: For which `is_prepared` is true. It knows the epoch.
        place: Where the checkpoint was saved; None: at the beginning. The random streams are those of the epoch's
            beginning.
        reads: Called with the random streams before a batch is read.
        report: Called with (batches read again, of how many).
    """
    base = loader.base_dataloader
    # A dispatcher fills up the epoch's last batch with samples of the first one.
    again = int(place is not None and _is_dispatcher(loader) and not loader._drop_last)
    reader = _Reader(base, _per_batch(loader), reads, place, report, again)
    if place and place.is_last:  # A dispatcher refuses to begin an epoch that has no batch.
        remaining = iter(reader)
        if _reads_here(loader):
            deque(remaining, maxlen=0)
        return
    loader.base_dataloader = reader
    try:
        iterator = iter(loader)
        first = next(iterator, reader)
    finally:
        loader.base_dataloader = base
    if first is not reader and not again:
        yield first
    yield from iterator


def lengths(loader: Any) -> list[int]:
    """The batches of an epoch on each rank; empty where they are as many on all ranks, or not known."""
    cut = loader.batch_sampler
    inner = getattr(cut, "batch_sampler", None)
    if inner is None or getattr(cut, "even_batches", True) or getattr(cut, "drop_last", False):
        return []
    processes, batches_in_all = cut.num_processes, len(inner)
    if not cut.split_batches:
        return [-(-(batches_in_all - rank) // processes) for rank in range(processes)]
    if not hasattr(inner, "sampler"):
        return []
    whole, rest = divmod(len(inner.sampler), cut.batch_size)
    part = cut.batch_size // processes
    return [whole + (rest > part * rank) for rank in range(processes)]


def _is_dispatcher(loader: Any) -> bool:
    return hasattr(loader, "slice_fn")


def _reads_here(loader: Any) -> bool:
    return not _is_dispatcher(loader) or loader.state.process_index == 0


def _per_batch(loader: Any) -> int:
    """The batches of the loader inside that make one of the prepared loader's."""
    return 1 if not _is_dispatcher(loader) or loader.split_batches else int(loader.state.num_processes)


class _Reader:
    """Stands in for the loader inside, for one epoch."""

    def __init__(
        self,
        base: DataLoader[Any],
        per_batch: int,
        reads: Callable[[rng.Streams], None],
        place: Place | None,
        report: Callable[[int, int], None],
        again: int,
    ) -> None:
        self._base, self._per_batch, self._reads, self._place, self._report = base, per_batch, reads, place, report
        self._again = again * per_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __iter__(self) -> Iterator[Any]:
        place = self._place
        if place is None:
            return self._read(iter(self._base), None)
        skip = place.consumed * self._per_batch
        if skips := can_skip(self._base):
            iterator = iter(skipping(self._base, skip, self._be_ahead, self._again))
        else:
            iterator = iter(self._base)
        begun = rng.streams()
        rng.load_streams(place.now)  # Some ranks read nothing (`dispatch_batches`).
        return self._read_on(iterator, begun, 0 if skips else skip)

    def _read_on(self, iterator: Iterator[Any], begun: rng.Streams, skip: int) -> Iterator[Any]:
        """Yield the batches after `skip` ones that are read again."""
        rng.put_back(begun)
        yield from islice(iterator, self._again)
        for number in range(self._again, skip):
            if next(iterator, self) is self:
                break  # The source has become shorter.
            self._report(number + 1, skip)
        if skip:
            self._be_ahead()
        yield from self._read(iterator, self._place)

    def _be_ahead(self) -> None:
        """Draw what follows as the attempt before did, when it read one batch ahead."""
        assert self._place
        rng.load_streams(self._place.now if self._place.ahead is None else self._place.ahead)

    def _read(self, iterator: Iterator[Any], place: Place | None) -> Iterator[Any]:
        number = 0
        while True:
            if not number % self._per_batch:
                if place and number:
                    rng.load_streams(place.now)
                    place = None
                if not self._base.num_workers:  # Workers draw from streams of their own.
                    self._reads(rng.streams())
            batch = next(iterator, self)
            if batch is self:
                break
            number += 1
            yield batch
        if place:
            rng.load_streams(place.now)
