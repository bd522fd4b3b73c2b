"""Buckets: the groups in which DistributedDataParallel (DDP) sums gradients, the same in every attempt.

DDP regroups them after its first backward pass. With more than two ranks an element's place in its bucket decides in
which order the ranks' values are added. So without a pass before it, the first step after a resume would add in another
order than the same step of the undisturbed run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.checkpoint import forward_state
from trainer.training import rng
from trainer.training.reach import has_reentrant_checkpoint, unreached
from trainer.training.trees import tensors


def settle_at_first_pass(module: object) -> None:
    """Run one forward and backward pass of a DDP module before its first forward pass, and drop the results.

    It does nothing for other objects, and for a DDP module that does not regroup (`find_unused_parameters`) or that
    learns from its first pass (`static_graph`).

    Args:
        module: DDP's, not compiled.
    """
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return
    ddp = module
    if ddp.find_unused_parameters or ddp.static_graph:
        return

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            handle.remove()
            _throw_away(ddp, args, kwargs)

    handle = ddp.register_forward_pre_hook(before, with_kwargs=True)


def _throw_away(ddp: nn.parallel.DistributedDataParallel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    named = {name: one for name, one in ddp.module.named_parameters() if one.requires_grad}
    if any(getattr(one, "_post_accumulate_grad_hooks", None) for one in named.values()):
        return  # They may step an optimizer.
    kept, gradients = forward_state.keep(ddp.module), {name: one.grad for name, one in named.items()}
    averages, ddp.require_backward_grad_sync = ddp.require_backward_grad_sync, True
    for parameter in named.values():
        parameter.grad = None
    with rng.set_aside():
        outputs = [one for one in tensors(ddp(*args, **kwargs)) if one.requires_grad]
        # Otherwise DDP would wait for the rest: the program's loss may have another way to it.
        if not unreached(outputs, named) and not has_reentrant_checkpoint(outputs):
            ones = [torch.ones_like(one) for one in outputs]
            torch.autograd.backward(outputs, ones, inputs=list(named.values()))
    torch.clear_autocast_cache()  # It holds a graph that is gone.
    ddp.require_backward_grad_sync = averages
    for name, parameter in named.items():
        parameter.grad = gradients[name]
    forward_state.put_back(ddp.module, kept)
