"""SeededItems: a data set whose items draw random numbers that do not depend on the process that loads them.

Each item is loaded under generators (random, numpy, torch) seeded for it alone: in the training process as in any
number of loader workers, and after a resume as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from trainer.training import rng
from trainer.training.sampler import MicroBatch
from trainer.training.skipping import changed_loader

Key = tuple[int, int]
"""An item's id, and the seed of its random numbers."""


class SeededItems(Dataset[Any]):
    """Loads and collates the batches of another data set; the user's own streams stay unchanged."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any]) -> None:
        self.dataset, self._collate = dataset, collate

    def __getitems__(self, keys: list[Key]) -> Any:
        """The collated batch. A data set that loads many items at once draws from the first one's generators."""
        with rng.set_aside_on_host():
            many = getattr(self.dataset, "__getitems__", None)
            if callable(many) and not isinstance(self.dataset, Subset):  # That of a Subset loads one by one.
                rng.seed_host(keys[0][1])
                return self._collate(many([index for index, _ in keys]))
            return self._collate([self._item(*key) for key in keys])

    def _item(self, index: int, seed: int) -> Any:
        rng.seed_host(seed)
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


class _Keys:
    """A batch sampler that tells each item's seed too; it begins where the loop is."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return (list(zip(batch.ids, batch.seeds, strict=True)) for batch in self._batches)


class _WorkerInit:
    """The user's `worker_init_fn`, which expects its own data set."""

    def __init__(self, given: Callable[[int], None]) -> None:
        self._given = given

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info and isinstance(info.dataset, SeededItems):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # torch refuses to change it otherwise.
        self._given(worker)


def seeded_loader(loader: DataLoader[Any], batches: Iterator[MicroBatch]) -> DataLoader[Any]:
    """A loader like the given one that loads these batches, each item under its own generators."""
    return changed_loader(
        loader,
        dataset=SeededItems(loader.dataset, loader.collate_fn),
        batch_sampler=_Keys(batches),
        collate_fn=_as_it_is,
        worker_init_fn=loader.worker_init_fn and _WorkerInit(loader.worker_init_fn),
    )


def _as_it_is(batch: Any) -> Any:
    return batch
