"""Losses, gradients and weights that are not finite (NaN or infinite): found, counted, and what becomes of the run.

A step is judged from its losses and its gradients' norm before the optimizer steps, from what all ranks told each
other, so that all draw the same conclusion. A checkpoint is judged from the copy that is written, beside training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from trainer.checkpoint.names import parameters
from trainer.checkpoint.shards import local
from trainer.errors import TrainerError

STOP, SKIP, IGNORE = "stop", "skip", "ignore"
IN_A_ROW = {STOP: 3, SKIP: 100}
"""After so many such steps in a row the run ends."""
SAID = 10
"""Skipped steps that an attempt says one by one; after that it says every hundredth."""
_PIECE = 1 << 18
_EXPONENTS = {
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float8_e5m2: (np.uint8, 0x7C),
}
"""The bits of infinity, of types that numpy is slow at or does not know; those of NaN are above them."""


class NotFiniteError(TrainerError):
    """Training gives no numbers any more; the run ends, and a relaunch goes on from the last finite checkpoint."""


class Watch:
    """What the steps so far have given; the same on every rank."""

    def __init__(self, policy: str) -> None:
        """Begin with steps that are all finite; `policy` is STOP, SKIP or IGNORE."""
        self._policy = policy
        self.row = 0
        """Steps in a row, up to the last one, that were not finite."""
        self.skipped = 0
        """Steps of the run whose update was dropped."""
        self._said = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"row": self.row, "skipped": self.skipped}

    def load_state_dict(self, saved: object) -> None:
        """Take over what a checkpoint kept; older ones kept nothing."""
        saved = saved if isinstance(saved, Mapping) else {}
        self.row, self.skipped = (
            value if type(value := saved.get(key)) is int and value >= 0 else 0 for key in ("row", "skipped")
        )

    def step(self, trouble: str | None) -> bool:
        """Take in a step, and what `trouble` there was; whether its update is to be dropped."""
        self.row = self.row + 1 if trouble else 0
        dropped = bool(trouble) and self._policy == SKIP
        self.skipped += dropped
        return dropped

    def worth_saying(self) -> bool:
        """Whether the trouble of the step just taken in is to be said."""
        self._said += 1
        if self._policy == IGNORE:
            return self._said == 1
        return self._policy == STOP or self._said <= SAID or self._said % 100 == 0

    @property
    def is_enough(self) -> bool:
        """Whether the run ends for it."""
        return self.row >= IN_A_ROW.get(self._policy, math.inf)


def trouble(losses: Sequence[float], norms: Sequence[float]) -> str | None:
    """What is not finite of a step's losses, in the order of micro-steps, and its gradients' norm; None: nothing is."""
    for value in losses:
        if not math.isfinite(value):
            return f"the loss is not finite ({value})"
    for value in norms:
        if not math.isfinite(value):
            return f"the gradients' norm is not finite ({value})"
    return None


def watched(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that training changes and that have to stay finite: those that are so at the start.

    Of a parameter that is cut over the ranks, each rank looks at its own part.
    """
    return frozenset(
        f"model.{name}"
        for name, parameter in parameters(model).items()
        if parameter.requires_grad and not is_spoilt(local(parameter))
    )


def is_spoilt(tensor: torch.Tensor, *, infinite: bool = True) -> bool:
    """Whether a tensor holds NaN, or (`infinite`) an infinite value. On the host it takes one thread."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    if tensor.device.type != "cpu":
        return bool((~torch.isfinite(tensor) if infinite else torch.isnan(tensor)).any())
    tensor = tensor.detach().reshape(-1)
    if tensor.dtype in _EXPONENTS:
        kind, ones = _EXPONENTS[tensor.dtype]
        bits = tensor.view(torch.uint8).numpy().view(kind)
        least, unsigned = ones if infinite else ones + 1, kind(2 * (1 << 8 * bits.itemsize - 2) - 1)
        return any(bool(((bits[at : at + _PIECE] & unsigned) >= least).any()) for at in range(0, len(bits), _PIECE))
    if tensor.dtype not in (torch.float32, torch.float64):
        return any(is_spoilt(piece.float(), infinite=infinite) for piece in tensor.split(_PIECE))
    values = tensor.numpy()
    with np.errstate(all="ignore"):
        for at in range(0, len(values), _PIECE):
            part = values[at : at + _PIECE]
            # A sum is three times as fast, and finite where all is; where it is not, large values may be why.
            if not math.isfinite(float(np.add.reduce(part))):
                bad = ~np.isfinite(part) if infinite else np.isnan(part)
                if bad.any():
                    return True
    return False
