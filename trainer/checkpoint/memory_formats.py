"""Memory formats: the order of a tensor's elements in memory (channels_last, transposed), which files do not keep.

A fused optimizer walks parameter, gradient and state side by side in memory, and a convolution chooses its kernel by
the format: a tensor restored in another format changes the numbers of the next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.checkpoint.shards import is_cut


def strides_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """The strides, by name, of tensors that are not contiguous and have no gaps in memory."""
    found = {}
    for name, tensor in tensors.items():
        if not is_cut(tensor):
            strides = tensor.stride()
            if strides != _in_rows(tensor.shape) and is_dense(tensor.shape, strides):
                found[name] = list(strides)
    return found


def laid_out(tensors: Mapping[str, torch.Tensor], strides: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same tensors, laid out by their strides if they have any; impossible strides are ignored."""
    return {name: relaid(tensor, strides[name]) if name in strides else tensor for name, tensor in tensors.items()}


def relaid(tensor: torch.Tensor, strides: Any) -> torch.Tensor:
    """A tensor with these strides: a copy, unless it has them already."""
    if is_cut(tensor) or not isinstance(strides, (list, tuple)) or not is_dense(tensor.shape, strides):
        return tensor
    if tensor.stride() == tuple(strides):
        return tensor
    found = torch.empty_strided(tensor.shape, tuple(strides), dtype=tensor.dtype, device=tensor.device)
    return found.copy_(tensor)


def is_dense(shape: tuple[int, ...], strides: Any) -> bool:
    """True if strides give every element of a shape its own place, without gaps."""
    if len(shape) != len(strides) or any(type(stride) is not int or not 0 <= stride < 1 << 62 for stride in strides):
        return False
    count = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != count:
            return False
        count *= size
    return 0 not in shape


def _in_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, count = [], 1
    for size in reversed(shape):
        strides.append(count)
        count *= max(1, size)
    return tuple(reversed(strides))
