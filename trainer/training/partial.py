"""Partial: the part of a checkpoint that belongs to the objects registered so far. Others may follow in later calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from trainer.checkpoint.optimizers import PREFIX
from trainer.checkpoint.state import MODEL


def part_of(
    tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], missing: Collection[str], optimizers: Sequence[bool]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, plain values) without those of some modules and optimizers; the other optimizers get new numbers.

    Args:
        tensors: All that were saved.
        plain: What state.json holds.
        missing: Names of saved modules that are not registered yet.
        optimizers: For each saved optimizer, in their order: True if it is registered.
    """
    kept = [number for number, is_here in enumerate(optimizers) if is_here]

    def renamed(name: str) -> str | None:
        if name.startswith(MODEL):
            return None if name.split(".", 2)[1] in missing else name
        if name.startswith(PREFIX):
            _, number, rest = name.split(".", 2)
            return f"{PREFIX}{kept.index(int(number))}.{rest}" if int(number) in kept else None
        return name

    plain = dict(plain)
    if isinstance(optims := plain.get("optim"), list):
        plain["optim"] = [optims[number] for number in kept]
    if isinstance(of_modules := plain.get("modules"), dict):
        pairs = [pair for pair in of_modules.get("dict", []) if str(pair[0]).split(".")[0] not in missing]
        plain["modules"] = {"dict": pairs}
    if isinstance(strides := plain.get("strides"), Mapping):
        plain["strides"] = {new: value for name, value in strides.items() if (new := renamed(name))}
    return {new: tensor for name, tensor in tensors.items() if (new := renamed(name))}, plain
