"""Replicas: all ranks must have the same parameters: a checkpoint holds one copy of what is not cut over them."""

from __future__ import annotations

import torch
from torch import nn

from trainer.bucket.hashing import fingerprint
from trainer.checkpoint import extras
from trainer.checkpoint.shards import is_cut
from trainer.errors import RunError
from trainer.ranks.group import RankGroup

SAMPLE = 64
"""Elements of each parameter that a sample has."""


def refuse_diverged(group: RankGroup, models: nn.Module, step: int, *, sample: bool) -> None:
    """Refuse modules that the ranks train apart. Every rank calls it.

    Args:
        group: The ranks.
        models: Holds the registered modules.
        step: The step that is done.
        sample: Compare the first elements of each parameter only; what is trained apart differs there soon.

    Raises:
        RunError: a module's parameters differ; the message names it.
    """
    if group.world_size == 1:
        return
    held = {name: list(module.parameters()) for name, module in models._modules.items() if module is not None}
    rows = group.exchange([_fingerprint(parameters, sample) for parameters in held.values()]).wait()
    for at, name in enumerate(held):
        if any(row[at] != rows[0][at] for row in rows):
            raise RunError(
                f"the ranks have different parameters of {name!r} after step {step}: each trains its own. Wrap it in "
                "DistributedDataParallel, and give each scheduler the same values on all ranks. A checkpoint would "
                "lose the others"
            )


def _fingerprint(parameters: list[nn.Parameter], sample: bool) -> int:
    tensors: list[torch.Tensor] = [one for one in parameters if not is_cut(one)]
    if sample:  # Joined by type and device: a few large transfers from a device instead of many small ones.
        parts: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for one in tensors:
            parts.setdefault((one.dtype, one.device), []).append(one.detach().reshape(-1)[:SAMPLE])
        tensors = [torch.cat(part) for part in parts.values()]
    return fingerprint(*map(str, extras.digests(tensors)))
