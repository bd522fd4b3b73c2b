"""Boundary: the state of a run between two optimizer steps, as it is to be saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainer.checkpoint.state import State


@dataclass
class Boundary:
    """The state of a run between two steps."""

    step: int
    samples: int
    state: State
    """The live tensors. Its `steady` tensors may still be copied until `Saver.await_copied` returns."""
    own: dict[str, torch.Tensor]
    """Tensors of this rank alone, on the host; nothing changes them."""
    plain: dict[str, Any] | None
    """The contents of state.json; rank 0 only."""
    facts: dict[str, Any] | None
    """Further fields of the manifest; rank 0 only."""
    last: bool = False
    """The attempt ends with this save: it is retried even after a stop was agreed."""
    watched: frozenset[str] = frozenset()
    """Names of tensors. The checkpoint counts as not finite if one of them holds NaN or infinite values."""
    spoilt_ends: bool = False
    """End the attempt if the checkpoint is not finite."""
    spoilt_remedy: str = ""
    """How to train on anyway, for the message about that."""
