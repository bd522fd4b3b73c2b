"""A check for tensors that are not finite (NaN or infinite); it reads the copy that is written, beside training."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from trainer.checkpoint.names import parameters
from trainer.checkpoint.shards import local
from trainer.errors import TrainerError

_PIECE = 1 << 18

_EXPONENTS = {
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float8_e5m2: (np.uint8, 0x7C),
}
"""The bits of infinity for types that numpy is slow at or does not know; the bits of NaN are greater."""


class NotFiniteError(TrainerError):
    """Training diverged to NaN or infinity. The run ends; a relaunch resumes from the last finite checkpoint."""


def watched(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that have to stay finite: those that are finite at the start.

    If a parameter is cut over the ranks, each rank checks its own part.
    """
    return frozenset(
        f"model.{name}"
        for name, parameter in parameters(model).items()
        if parameter.requires_grad and not is_spoilt(local(parameter))
    )


def is_spoilt(tensor: torch.Tensor, *, infinite: bool = True) -> bool:
    """True if a tensor holds NaN or, with `infinite`, an infinite value. On the host it uses one thread."""
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
        return any(is_spoilt(piece.float(), infinite=infinite) for piece in tensor.split(_PIECE))  # type: ignore[no-untyped-call]
    values = tensor.numpy()
    with np.errstate(all="ignore"):
        for at in range(0, len(values), _PIECE):
            part = values[at : at + _PIECE]
            # A sum is three times as fast. If it is finite, so is every value; if not, large values may be the reason.
            if not math.isfinite(float(np.add.reduce(part))):
                bad = ~np.isfinite(part) if infinite else np.isnan(part)
                if bad.any():
                    return True
    return False
