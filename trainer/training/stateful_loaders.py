"""Stateful loaders: loaders and data sets that are registered, because they restore their own place in the data.

torchdata's `StatefulDataLoader`, and a Hugging Face `IterableDataset` that the training process reads itself. Their
state is saved between two batches, so it is that of the consumed batch. What they cannot keep is refused or printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainer.errors import RunError


def keeps_its_place(loader: Iterable[Any], others: Mapping[str, Any], print_line: Callable[[str], None]) -> bool:
    """True if the loader or its data set is registered, so that it restores its own position.

    Raises:
        RunError: the data set is registered, and its position is known in the loader's workers alone.
    """
    dataset = getattr(loader, "dataset", None)
    for name, thing in others.items():
        if thing is loader or (dataset is not None and thing is dataset):
            if thing is not loader and getattr(loader, "num_workers", None):
                raise RunError(
                    f"register({name}=...): the loader's workers read copies of this data set, so its state here does "
                    "not change. Register a torchdata.stateful_dataloader.StatefulDataLoader, or use num_workers=0"
                )
            if _has_shuffle_buffer(thing if dataset is None else dataset):
                print_line(
                    f"{name} has a shuffle buffer, and its state_dict() does not hold the buffer's samples: a resume "
                    "leaves them out. For an exact one, do not register it: its epoch is then read again"
                )
            return True
    return False


def _has_shuffle_buffer(dataset: object) -> bool:
    """True for a stream of the library `datasets` after `shuffle(buffer_size=...)`, which has no public sign."""
    parts = [getattr(dataset, "_ex_iterable", None)]
    for part in parts:
        if type(part).__name__.startswith("BufferShuffled"):
            return True
        inner = [getattr(part, "ex_iterable", None), *(getattr(part, "ex_iterables", None) or ())]
        parts += [one for one in inner if one is not None]  # The loop goes on with these.
    return False
