"""StepTrace: what a rehearsal compares of each step of a user's loop beside its metrics, to name a cause.

Only a rehearsal asks for it (SKYSPOT_TRACE_STEPS): hashing every batch would cost a GPU's training time.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainer.bucket.hashing import MASK, fingerprint
from trainer.training.same_batches import hash_of

VARIABLE = "SKYSPOT_TRACE_STEPS"


class StepTrace:
    """Collects what one step of rank 0 consists of; without SKYSPOT_TRACE_STEPS it does nothing."""

    def __init__(self) -> None:
        self._is_wanted = bool(os.environ.get(VARIABLE))
        self._batches = 0
        self._has_tensors = False

    def batch(self, batch: object) -> None:
        """Take in a batch that the loop is about to get."""
        if not self._is_wanted:
            return
        if found := hash_of(batch):
            self._has_tensors = True
            self._batches = (self._batches * 31 + found) & MASK

    def step(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Any]:
        """What the step that is over consisted of, as fields of its line of metrics.

        `batch` is a hash of its batches' tensors, and missing if they had none; `streams` has one of each random
        stream after it; `rates` has the learning rate of each optimizer's first group.
        """
        if not self._is_wanted:
            return {}
        found: dict[str, Any] = {"batch": f"{self._batches:016x}"} if self._has_tensors else {}
        self._batches, self._has_tensors = 0, False
        return {
            **found,
            "streams": _streams(),
            "rates": {name: _rate(optimizer) for name, optimizer in optimizers.items()},
        }


def _streams() -> dict[str, str]:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    found = {
        "torch": fingerprint(torch.get_rng_state().numpy().data),
        "numpy": fingerprint(str(list(keys)), str(position)),
        "python": fingerprint(str(random.getstate())),
    }
    return {name: f"{value:016x}" for name, value in found.items()}


def _rate(optimizer: torch.optim.Optimizer) -> float | None:
    rate = optimizer.param_groups[0].get("lr")
    return None if rate is None else float(rate)
