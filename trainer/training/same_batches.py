"""Same batches: ranks that all train on one batch do the work of one process, which nobody sees in a loss."""

from __future__ import annotations

import torch

from trainer.bucket.hashing import MASK, fingerprint
from trainer.ranks.group import RankGroup
from trainer.training.trees import tensors


def hash_of(batch: object) -> int:
    """A hash of a batch's dense tensors, wherever they are; 0 if it has none."""
    found = 0
    for tensor in tensors(batch):
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            continue
        data = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        found = (found * 31 + fingerprint(data.numpy().data)) & MASK
    return found


def are_same(group: RankGroup, mine: int) -> bool:
    """True if all of several ranks have the same batch. Every rank calls it with `hash_of` its own."""
    if group.world_size == 1:
        return False
    hashes = {row[0] for row in group.exchange([mine]).wait()}
    return len(hashes) == 1 and hashes != {0}


def line(processes: int) -> str:
    """The line that tells a user."""
    return (
        f"All {processes} processes trained on the same batch in their first step: each does the work of one. Share "
        "the samples out with run.sampler() or torch's DistributedSampler, and wrap the model in "
        "DistributedDataParallel; or start one process."
    )
