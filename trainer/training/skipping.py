"""Skipping: a `DataLoader` without its first batches, of which no sample is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def can_skip(loader: Iterable[Any]) -> bool:
    """True for a `DataLoader` that draws its batches' indices from a sampler, and yields what it loads.

    A subclass that iterates in its own way may yield other batches than it draws indices for.
    """
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def changed_loader(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """A copy of the loader with other attributes."""
    made = copy(loader)
    vars(made).update(_iterator=None, **attributes)  # Set directly: a DataLoader refuses to change them.
    return made


class _Rest:
    """A batch sampler that draws the first batches' indices and drops them."""

    def __init__(self, batch_sampler: Iterable[Any], skip: int, then: Callable[[], None], keep: int) -> None:
        self._batch_sampler, self._skip, self._then, self._keep = batch_sampler, skip, then, keep

    def __iter__(self) -> Iterator[Any]:
        return self._after(iter(self._batch_sampler))  # At once: it may draw the whole order here.

    def _after(self, indices: Iterator[Any]) -> Iterator[Any]:
        yield from islice(indices, self._keep)
        for _ in range(self._skip - self._keep):
            next(indices, None)
        self._then()
        yield from indices


def skipping(loader: Any, skip: int, then: Callable[[], None], keep: int = 0) -> Iterable[Any]:
    """The same `DataLoader` without its first batches, of which no sample is loaded.

    Args:
        loader: For which `can_skip` is true.
        skip: How many batches to leave out.
        then: Called once their indices are drawn, before the next sample is loaded.
        keep: How many of them, at the beginning, are loaded after all.
    """
    rest = _Rest(loader.batch_sampler, skip, then, keep)
    return changed_loader(loader, batch_sampler=rest, persistent_workers=False)
