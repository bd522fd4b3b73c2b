"""The norm of a step's gradients, and clipping; for dense and sparse gradients."""

from __future__ import annotations

import torch
from torch import nn


def clip(model: nn.Module, limit: float) -> torch.Tensor:
    """Scale all gradients so that their norm is at most `limit` (0: leave them as they are); their norm before, 0-d."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not any(_grad(parameter).is_sparse for parameter in parameters):
        if limit:
            return nn.utils.clip_grad_norm_(parameters, limit)
        return nn.utils.get_total_norm([_grad(parameter) for parameter in parameters])
    for parameter in parameters:
        if _grad(parameter).is_sparse:  # A row that stands in it twice counts with its sum.
            parameter.grad = _grad(parameter).coalesce()
    values = [grad.values() if grad.is_sparse else grad for grad in map(_grad, parameters)]
    norm = nn.utils.get_total_norm(values)
    if limit:
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)  # As clip_grad_norm_ does it.
        for value in values:
            value.detach().mul_(factor.to(value.device))
    return norm


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
