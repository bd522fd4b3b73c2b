"""Kept: the state at the last boundary, for a stop that drops the micro-steps after it.

A micro-step changes buffers, random streams, the place in the data and plain values: they are copied. Parameters and
the optimizers' state change with an optimizer's step, and large tensors of other objects (an average of the weights)
too: they are only watched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from trainer.checkpoint.shards import local
from trainer.checkpoint.staging import version
from trainer.checkpoint.state import State

COPIED_BYTES = 1 << 20
"""Larger tensors of other objects than modules and optimizers are watched, not copied."""


@dataclass(frozen=True)
class Kept:
    """What a save of a boundary needs, while later micro-steps go on."""

    state: State
    streams: torch.Tensor
    """This rank's place in its data, and its random streams."""
    marks: Mapping[str, tuple[int, int]]
    """The version and the address of each tensor that is watched."""

    @property
    def is_whole(self) -> bool:
        """True if nothing has changed the watched tensors. A write through `.data` cannot be seen."""
        return all(mark(self.state.tensors[name]) == kept for name, kept in self.marks.items())


def keep(state: State, streams: torch.Tensor) -> Kept:
    """Keep the state of this boundary.

    Args:
        state: The live tensors and values.
        streams: As of `Contents.streams`.
    """
    watched = {
        name
        for name, tensor in state.tensors.items()
        if name in state.steady or (name not in state.buffers and tensor.nbytes > COPIED_BYTES)
    }
    tensors = {name: tensor if name in watched else tensor.detach().clone() for name, tensor in state.tensors.items()}
    return Kept(replace(state, tensors=tensors), streams, {name: mark(tensors[name]) for name in watched})


def mark(tensor: torch.Tensor) -> tuple[int, int]:
    """The version and the address of a tensor: a change in place, or of its memory, changes them."""
    return version(tensor), local(tensor).data_ptr()
