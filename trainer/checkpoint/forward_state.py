"""What a forward pass may change in a model: buffers and extra state. Put back after a pass that does not count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.checkpoint import buffers, extra_states


@dataclass(frozen=True)
class Kept:
    """Copies of it."""

    buffers: buffers.Kept
    extra_states: dict[str, Any]


def keep(model: nn.Module) -> Kept:
    """Copy all buffers and extra states."""
    return Kept(buffers.keep(model), extra_states.keep(model))


def put_back(model: nn.Module, kept: Kept) -> None:
    """Restore them."""
    buffers.put_back(model, kept.buffers)
    extra_states.put_back(model, kept.extra_states)
