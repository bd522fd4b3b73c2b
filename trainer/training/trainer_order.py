"""The order of the samples (order.py) as a sampler for Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trainer.errors import RunError
from trainer.training.order import sample_ids


class TrainerOrder(torch.utils.data.Sampler[int]):
    """The samples of an epoch: positions of the run (order.py) from its first step to its last."""

    def __init__(self, trainer: Any, seed: int, batch: int) -> None:
        """Describe the order.

        Args:
            trainer: Knows the step and the data set.
            seed: Of the order.
            batch: Samples of a step, on all processes together.

        Raises:
            RunError: the data set has no length.
        """
        try:
            self._count = len(trainer.train_dataset)
        except TypeError:
            raise RunError("SpotCallback(exact=True) needs a data set with a length") from None
        self._trainer, self._seed = trainer, seed
        self._steps = -(-self._count // batch)
        self._length = self._steps * batch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        start = self._trainer.state.global_step // self._steps * self._length
        yield from sample_ids(self._seed, self._count, start, start + self._length).tolist()


def grouping(args: Any) -> str:
    """The argument that asks for a sampler which draws from the process's random numbers; empty if none does."""
    if getattr(args, "group_by_length", False):  # In early releases of transformers 5.
        return "group_by_length"
    strategy = getattr(args, "train_sampling_strategy", "random")
    return "" if strategy in ("random", "sequential") else f"train_sampling_strategy={strategy!r}"
