"""Frozen base: a fingerprint of the parameters that a framework does not train, and leaves out of its checkpoints."""

from __future__ import annotations

from torch import nn

from trainer.bucket.hashing import fingerprint
from trainer.checkpoint import extras
from trainer.checkpoint.shards import is_cut, local
from trainer.ranks.group import RankGroup


def frozen_digest(model: nn.Module, group: RankGroup) -> int:
    """A fingerprint of the frozen parameters, the same on all ranks; 0 if there are none. All ranks call it.

    Parameters that are cut over the ranks have another fingerprint on another number of ranks.
    """
    frozen = [parameter for _, parameter in sorted(model.named_parameters()) if not parameter.requires_grad]
    if not frozen:
        return 0
    parts = [part for part in map(local, frozen) if part.numel()]  # Some ranks have no part of a small one.
    mine = fingerprint("", *extras.digests(parts))
    return fingerprint(*map(str, group.gather("frozen", mine))) if any(map(is_cut, frozen)) else mine
