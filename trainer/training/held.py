"""Held: tells whether an evaluation has left a state as it was, or has put another one in its place for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from trainer.checkpoint import extras
from trainer.checkpoint.shards import local
from trainer.checkpoint.state import State
from trainer.ranks.group import RankGroup


class Held:
    """A state at the beginning of an evaluation. A callback may evaluate with other weights, such as averaged ones."""

    def __init__(self, group: RankGroup, look: Callable[[], object]) -> None:
        """Look at the state.

        Args:
            group: The ranks.
            look: Returns what can be compared, as `summary` or `digests` does.
        """
        self._group, self._look, self._before = group, look, look()

    def is_unchanged(self) -> bool:
        """True if the state is what it was, on every rank. Every rank calls it."""
        return self._group.all_ranks(self._look() == self._before)


def summary(state: State, rank: int) -> object:
    """A state's plain values, and a fingerprint of each tensor that this rank's are saved of.

    Buffers are saved of rank 0: DistributedDataParallel sends its own to the others in a validation, too.
    """
    saved = {name: tensor for name, tensor in state.tensors.items() if rank == 0 or name not in state.buffers}
    named = {**saved, **state.own}
    return state.plain, list(named), digests(named.values())


def digests(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A fingerprint of each tensor; of this rank's part where it is cut over the ranks."""
    return extras.digests([part for part in map(local, tensors) if part.numel()])
