"""The current GPU is made that of the user's modules, because torch takes random numbers from the current one.

A script that moves its model to `cuda:LOCAL_RANK` need not make that GPU the current one. Without it, each rank would
save the random streams of the first GPU, and use memory there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def make_current(tensors: Iterable[torch.Tensor]) -> None:
    """Make a GPU the current one, if all of the tensors that are on GPUs are on that one."""
    found = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    if len(found) == 1:
        torch.cuda.set_device(found.pop())
