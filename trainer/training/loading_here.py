"""Loading here: once a data loader's worker has died at a stop, the training process loads the batches itself.

So the step under way ends on this rank as on the others, which have got their batches, and all stop at one boundary.
It needs the samples by their indices: an `IterableDataset` is read in the workers alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, cast

from torch._utils import ExceptionWrapper
from torch.utils.data import _utils
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter
from torch.utils.data.dataloader import _DatasetKind as Kind

from trainer.machine.flag import Flag
from trainer.machine.loader_workers import died_at_stop
from trainer.training import rng

LOOK_S = 0.5
"""How often to look whether a worker has died, while its batch is awaited; torch looks every 5 s."""

_heard: Flag | None = None
"""Set once a stop was heard."""


def load_here_at_stop(heard: Flag) -> None:
    """Let every loader go on without its workers, once one has died and a stop was heard.

    Args:
        heard: Set once a stop was heard.
    """
    global _heard
    _heard = heard
    if not hasattr(_MultiProcessingDataLoaderIter, "_here"):
        _replace_methods(_MultiProcessingDataLoaderIter)


def _replace_methods(kind: Any) -> None:
    """Replace those methods of torch's that know what a worker is to load, and that wait for it."""
    reset, next_data, try_get_data, next_index = kind._reset, kind._next_data, kind._try_get_data, kind._next_index

    def reset_anew(self: Any, loader: Any, first_iter: bool = False) -> None:
        if self._here is None:
            try:
                reset(self, loader, first_iter)
                return
            except RuntimeError as error:  # Of workers that the epoch before has left.
                if not _goes_on(self, error):
                    raise
                self._death = error
        else:
            _BaseDataLoaderIter._reset(self, loader, first_iter)
        self._task_info = {}
        self._here = _batches(self, next_index)

    def next_data_of_any(self: Any) -> Any:
        if self._here is None:
            try:
                return next_data(self)
            except RuntimeError as error:
                if not _goes_on(self, error):
                    raise
                self._here, self._death = _batches(self, next_index), error
        return next(self._here)

    def try_get_data_often(self: Any, timeout: float = LOOK_S) -> Any:
        return try_get_data(self, timeout)

    def next_index_kept(self: Any) -> Any:
        index = next_index(self)
        outstanding = {task: kept for task, kept in self._indices.items() if task in self._task_info}
        self._indices = {**outstanding, self._send_idx: index}
        return index

    kind._here, kind._death, kind._indices = None, None, {}
    kind._reset, kind._next_data = reset_anew, next_data_of_any
    kind._try_get_data, kind._next_index = try_get_data_often, next_index_kept


def _goes_on(iterator: Any, error: RuntimeError) -> bool:
    """True if an error is a worker's death at a stop, and this process can load the samples itself."""
    is_map = iterator._dataset_kind == Kind.Map
    return is_map and _heard is not None and died_at_stop(error, _heard)


def _batches(iterator: Any, next_index: Any) -> Iterator[Any]:
    """Yield what the workers have loaded ahead, and load the rest of the epoch here."""
    make: Any = Kind.create_fetcher
    fetcher = make(
        iterator._dataset_kind, iterator._dataset, iterator._auto_collation, iterator._collate_fn, iterator._drop_last
    )
    tasks = deque(sorted(iterator._task_info.items()))
    while tasks:
        task, info = tasks.popleft()
        yield _loaded(info[1]) if len(info) == 2 else _load(iterator, fetcher, iterator._indices[task])
    while True:
        try:
            index = next_index(iterator)
        except StopIteration:
            return
        yield _load(iterator, fetcher, index)


def _loaded(data: Any) -> Any:
    """What a worker has loaded: a batch, or an error."""
    if isinstance(data, ExceptionWrapper):
        cast(Any, data).reraise()
    return data


def _load(iterator: Any, fetcher: Any, index: Any) -> Any:
    """Load a batch; the program's own random streams do not change, as where a worker loads it."""
    with rng.set_aside_on_host():
        rng.seed_host(iterator._base_seed)
        try:
            data = fetcher.fetch(index)
        except Exception as unable:  # Its items may need what only a worker has.
            raise iterator._death from unable
    if iterator._pin_memory:
        pin: Any = _utils.pin_memory.pin_memory
        return pin(data, iterator._pin_memory_device)
    return data
