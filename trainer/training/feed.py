"""Feed: the batches of a user's loader, epoch after epoch, from the batch at which a checkpoint was saved.

A `DataLoader` over a map-style data set is fast-forwarded by its sampler's indices, drawn again under the random
streams with which the epoch began; no skipped sample is loaded. Anything else is read again. A loader that accelerate
has prepared is one of the two, too (prepared.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from trainer.errors import RunError
from trainer.training import prepared, rng
from trainer.training.registered import Registered
from trainer.training.skipping import can_skip, skipping

REPORT_S = 5.0
"""Reading again what was consumed is reported this often, in seconds."""


class Feed:
    """Yields batches, and counts in the contents which of them are consumed."""

    def __init__(self, loader: Iterable[Any], contents: Registered, print_line: Callable[[str], None]) -> None:
        self._loader, self._contents, self._print_line = loader, contents, print_line
        self._keeps_its_place = any(loader is thing for thing in contents.others.values())
        """It is registered: it restores its own position."""
        self._is_prepared = prepared.is_prepared(loader) and not self._keeps_its_place
        self._reported = time.monotonic()

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
            contents.batches, contents.is_last = 0, False

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
            yield from self._prepared(None) if self._is_prepared else self._loader
            return
        if contents.epoch_streams is not None:
            rng.load_streams(contents.epoch_streams)
        for generator, state in zip(self._generators(), contents.epoch_generators, strict=False):
            generator.set_state(state)
        if self._keeps_its_place:
            rng.load_streams(restored)
            yield from self._loader
        elif self._is_prepared:
            yield from self._prepared(prepared.Place(skip, contents.is_last, contents.ahead_at_restore, restored))
        elif can_skip(self._loader):
            yield from skipping(self._loader, skip, lambda: rng.load_streams(restored))
        else:
            yield from self._read_again(skip, lambda: rng.load_streams(restored))

    def _prepared(self, place: prepared.Place | None) -> Iterator[Any]:
        """The batches of a loader that accelerate has prepared."""
        loader, contents = self._loader, self._contents

        def reads(ahead: rng.Streams) -> None:
            contents.ahead = ahead

        for batch in prepared.batches(loader, place, reads, self._report):
            contents.is_last = bool(loader.end_of_dataloader)  # type: ignore[attr-defined]
            yield batch

    def _read_again(self, skip: int, then: Callable[[], None]) -> Iterator[Any]:
        """Read the consumed batches once more, and yield the rest."""
        iterator = iter(self._loader)
        for number in range(skip):
            if next(iterator, self) is self:
                break  # The source has become shorter.
            self._report(number + 1, skip)
        then()
        yield from iterator

    def _report(self, done: int, count: int) -> None:
        """Print now and then how many consumed batches are read again."""
        if time.monotonic() - self._reported > REPORT_S:
            self._reported = time.monotonic()
            self._print_line(
                f"reading the consumed batches of epoch {self._contents.epoch} again: {done} of {count}. A map-style "
                "data set, or a loader with state_dict that is registered, needs no second reading"
            )

    def _parts(self) -> list[Any]:
        """The loader, its samplers, those inside them, and its data set, as far as it has them."""
        parts = [self._loader]
        for part in parts:  # It grows meanwhile.
            inner = (getattr(part, name, None) for name in ("sampler", "batch_sampler"))
            parts += [one for one in inner if one is not None and not any(one is known for known in parts)]
        return [*parts, getattr(self._loader, "dataset", None)]

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
