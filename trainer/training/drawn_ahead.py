"""Random numbers that the data set and the collator of Hugging Face's Trainer draw in the training process.

accelerate's loader draws a batch before the one in front of it is trained on, so at a boundary the next batch is drawn
already. After a resume within an epoch, that batch is drawn again under the random streams that it was drawn under, and
the one after it under those of the boundary. The Trainer by itself draws both under other streams.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trainer.training import rng


class DrawnAhead:
    """Notes the streams under which a Trainer's newest batch is drawn, and draws it again after a resume."""

    def __init__(
        self, trainer: Any, saved: str | None, folder: str | None, give: Callable[[object], None] = lambda batch: None
    ) -> None:
        """Take the place of the Trainer's `get_batch_samples`.

        Args:
            trainer: The Trainer, before its first step.
            saved: What `save` returned at the restored boundary; None where this rank has none that fits.
            folder: The checkpoint's folder, with the Trainer's file of random streams.
            give: Gets each batch that is about to be trained on.
        """
        self._trainer, self._saved, self._folder, self._give = trainer, saved, folder, give
        self._original, trainer.get_batch_samples = trainer.get_batch_samples, self._get
        self._before: rng.Streams | None = None

    def save(self) -> str | None:
        """Return the streams of this process as they were before the newest batch was drawn, as text."""
        return None if self._before is None else bytes(rng.save_streams(self._before).numpy()).decode()

    def _get(self, batches: Iterator[Any], *others: Any) -> Any:
        saved, self._saved = self._saved, None
        if saved is not None:
            self._draw_again(batches, saved)
        found = self._original(_Noted(batches, self._note), *others)
        for batch in found[0]:
            self._give(batch)
        return found

    def _note(self) -> None:
        self._before = rng.host_streams()

    def _draw_again(self, batches: Iterator[Any], saved: str) -> None:
        """Have the loader draw the batch that was drawn ahead, and restore the boundary's streams."""
        from accelerate.data_loader import DataLoaderShard, SkipBatchSampler

        loader = inspect.getgeneratorlocals(batches).get("self") if inspect.isgenerator(batches) else None
        if not isinstance(loader, DataLoaderShard) or loader.num_workers:
            return
        skipping, trainer = loader.batch_sampler, self._trainer
        if not isinstance(skipping, SkipBatchSampler):  # No batch of the epoch is consumed: the Trainer is right.
            return
        done = skipping.skip_batches
        skipping.skip_batches = done - 1
        streams = torch.frombuffer(bytearray(saved.encode()), dtype=torch.uint8)
        if done == 1:
            rng.load_streams(streams)  # Those at the epoch's beginning, where the first two batches are drawn together.
        else:
            skipping.batch_sampler = _Switched(skipping.batch_sampler, done, streams)
        next(batches)  # Draws two: one that is consumed, and the one ahead.
        trainer._load_rng_state(self._folder)
        # The Trainer's own call follows when the batches of the step are drawn.
        trainer._load_rng_state = lambda _: trainer.__dict__.pop("_load_rng_state", None)


class _Noted:
    """An iterator that calls a function before each item."""

    def __init__(self, items: Iterator[Any], note: Callable[[], None]) -> None:
        self._items, self._note = items, note

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._note()
        return next(self._items)


class _Switched:
    """A batch sampler that loads random streams before it returns the ids of one batch, which is loaded right after."""

    def __init__(self, sampler: Any, number: int, streams: torch.Tensor) -> None:
        self._sampler, self._number, self._streams = sampler, number, streams

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        for number, ids in enumerate(self._sampler):
            if number == self._number:
                rng.load_streams(self._streams)
            yield ids
