"""Feed: the batches of a user's loader, epoch after epoch, from the batch at which a checkpoint was saved.

A `DataLoader` over a map-style data set is fast-forwarded by its sampler's indices, drawn again under the random
streams with which the epoch began; no skipped sample is loaded. Anything else is read again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.errors import RunError
from trainer.training import rng
from trainer.training.registered import Registered

REPORT_S = 5.0
"""Reading again what was consumed is reported this often, in seconds."""


class Feed:
    """Yields batches, and counts in the contents which of them are consumed."""

    def __init__(self, loader: Iterable[Any], contents: Registered, print_line: Callable[[str], None]) -> None:
        self._loader, self._contents, self._print_line = loader, contents, print_line
        self._keeps_its_place = any(loader is thing for thing in contents.others.values())
        """It is registered: it restores its own position."""

    def epochs(self) -> Iterator[Any]:
        """Yield batch after batch, for ever.

        Raises:
            RunError: an epoch has no batch.
        """
        contents = self._contents
        while True:
            count = 0
            for batch in self._epoch():
                count += 1
                contents.batches += 1
                yield batch
            if not count and not contents.batches:
                raise RunError(
                    "steps(loader): the loader has no batch. Check the length of the data set, and drop_last where it "
                    "is shorter than a batch"
                )
            contents.epoch += 1
            contents.batches = 0

    def _epoch(self) -> Iterator[Any]:
        """The batches of this epoch that are not consumed yet."""
        contents, restored = self._contents, self._contents.streams_at_restore
        contents.streams_at_restore = None
        self._set_epoch(contents.epoch)
        skip = contents.batches
        if restored is None or not skip:
            if restored is not None:
                rng.load_streams(restored)
            contents.epoch_streams = rng.save_streams()
            contents.epoch_generators = [generator.get_state() for generator in self._generators()]
            yield from self._loader
            return
        if contents.epoch_streams is not None:
            rng.load_streams(contents.epoch_streams)
        for generator, state in zip(self._generators(), contents.epoch_generators, strict=False):
            generator.set_state(state)
        if self._keeps_its_place:
            rng.load_streams(restored)
            yield from self._loader
        elif can_skip(self._loader):
            yield from skipping(self._loader, skip, lambda: rng.load_streams(restored))
        else:
            yield from self._read_again(skip, lambda: rng.load_streams(restored))

    def _read_again(self, skip: int, then: Callable[[], None]) -> Iterator[Any]:
        """Read the consumed batches once more, and yield the rest."""
        iterator, reported = iter(self._loader), time.monotonic()
        for number in range(skip):
            if next(iterator, self) is self:
                break  # The source has become shorter.
            if time.monotonic() - reported > REPORT_S:
                reported = time.monotonic()
                self._print_line(
                    f"reading the consumed batches of epoch {self._contents.epoch} again: {number + 1} of {skip}. A "
                    "map-style data set, or a loader with state_dict that is registered, needs no second reading"
                )
        then()
        yield from iterator

    def _parts(self) -> list[Any]:
        """The loader, its samplers and its data set, as far as it has them."""
        inner = getattr(self._loader, "batch_sampler", None)
        sampler, dataset = (getattr(self._loader, name, None) for name in ("sampler", "dataset"))
        return [self._loader, sampler, inner, getattr(inner, "sampler", None), dataset]

    def _generators(self) -> list[torch.Generator]:
        """The generators that draw the order, if the loader has its own."""
        found = (getattr(part, "generator", None) for part in self._parts()[:-1])
        return list(dict.fromkeys(one for one in found if isinstance(one, torch.Generator)))

    def _set_epoch(self, epoch: int) -> None:
        """Tell the sampler or data set the epoch, as DistributedSampler and IterableDatasets of a Hub want it."""
        for part in self._parts():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
                return


def can_skip(loader: Iterable[Any]) -> bool:
    """True for a plain `DataLoader` that draws its batches' indices from a sampler."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


class _Rest:
    """A batch sampler that draws the first batches' indices and drops them."""

    def __init__(self, batch_sampler: Iterable[Any], skip: int, then: Callable[[], None]) -> None:
        self._batch_sampler, self._skip, self._then = batch_sampler, skip, then

    def __iter__(self) -> Iterator[Any]:
        indices = iter(self._batch_sampler)
        for _ in range(self._skip):
            next(indices, None)
        self._then()
        yield from indices


def skipping(loader: Any, skip: int, then: Callable[[], None]) -> Iterable[Any]:
    """The same `DataLoader` without its first batches, of which no sample is loaded.

    Args:
        loader: For which `can_skip` is true.
        skip: How many batches to leave out.
        then: Called once their indices are drawn, before the next sample is loaded.
    """
    more: dict[str, Any] = {}
    if loader.num_workers:
        more = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": False}
    return DataLoader(
        loader.dataset,
        batch_sampler=_Rest(loader.batch_sampler, skip, then),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **more,
    )
