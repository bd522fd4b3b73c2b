"""Shards: which rank holds which part of which tensor, and which rank writes it. Every rank computes the same.

A plain tensor is whole on every rank, and one rank writes it. A DTensor (FSDP2's `fully_shard`, tensor parallelism) is
cut over a mesh of ranks. Each rank writes the parts that it holds; if several ranks hold a part, one writes it. Parts
are dealt before anything is copied, so that a node stages one copy of the state however many ranks run there.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch

from trainer.errors import TrainerError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets of a part in its tensor and its sizes, in elements by dimension."""


class ShardError(TrainerError):
    """A tensor's layout over the ranks cannot be saved; the message names it."""


@dataclass(frozen=True)
class Part:
    """A box of a tensor that some ranks hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """The whole tensor's."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    holders: Sequence[int]
    """The ranks that hold it."""

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        """True if it is all of its tensor."""
        return self.sizes == self.shape


def is_cut(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """True if it is a DTensor. Importing their module takes half a second; if it is not loaded, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; no copy."""
    tensor = tensor.detach()
    return tensor.to_local() if is_cut(tensor) else tensor


def boxes(tensor: DTensor) -> dict[int, Box]:
    """The box that each rank of a DTensor's mesh holds."""
    mesh, shape = tensor.device_mesh.mesh, tuple(tensor.shape)
    return {
        int(mesh[coordinate]): _box(shape, tuple(mesh.shape), coordinate, tensor.placements)
        for coordinate in itertools.product(*(range(size) for size in mesh.shape))
    }


@functools.lru_cache(maxsize=1 << 16)
def _box(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Sequence[object]
) -> Box:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)  # type: ignore[arg-type]
    return tuple(map(int, offsets)), tuple(map(int, sizes))


def box_here(tensor: torch.Tensor, rank: int) -> Box:
    """The box of a tensor that this rank holds."""
    if is_cut(tensor):
        return boxes(tensor)[rank]
    return (0,) * tensor.ndim, tuple(tensor.shape)


def like(whole: DTensor, part: torch.Tensor) -> DTensor:
    """A DTensor that is cut like `whole`, made from this rank's part of it."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def parts_of(tensors: Mapping[str, torch.Tensor], ranks: int, rank0: Collection[str] = ()) -> list[Part]:
    """Every part of every tensor, by name and place.

    Args:
        tensors: With the same names, shapes and layouts on all ranks.
        ranks: The number of ranks.
        rank0: Names of the tensors that may differ between ranks; rank 0 writes them.

    Raises:
        ShardError: a tensor is a sum that is still pending, or some of its parts are on no rank of this run.
    """
    found = []
    for name, tensor in sorted(tensors.items()):
        if is_cut(tensor):
            found += _cut_parts(name, tensor)
            continue
        shape = tuple(tensor.shape)
        holders: Sequence[int] = (0,) if name in rank0 else range(ranks)
        found.append(Part(name, tensor.dtype, shape, (0,) * len(shape), shape, holders))
    return found


def _cut_parts(name: str, tensor: DTensor) -> list[Part]:
    """The parts of a tensor that is cut over the ranks."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise ShardError(f"{name}: its sum over the ranks is pending (a Partial placement); redistribute it first")
    shape = tuple(tensor.shape)
    held: dict[Box, list[int]] = {}
    for rank, box in boxes(tensor).items():
        held.setdefault(box, []).append(rank)
    # Ranks beyond the last row hold nothing, unless there is nothing to hold.
    full = {box: by for box, by in held.items() if math.prod(box[1])} or dict(list(held.items())[:1])
    if sum(math.prod(sizes) for _, sizes in full) != math.prod(shape):
        raise ShardError(f"{name}: its parts on the ranks do not cover the tensor exactly once")
    return [Part(name, tensor.dtype, shape, *box, sorted(by)) for box, by in sorted(full.items())]


def deal(parts: Sequence[Part], ranks: int) -> list[list[Part]]:
    """The parts that each rank writes: the largest is dealt first, each to its holder with the fewest bytes so far."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for part in sorted(parts, key=lambda part: (len(part.holders) > 1, -part.bytes, part.name, part.offsets)):
        rank = min(part.holders, key=lambda holder: (filled[holder], holder))
        shares[rank].append(part)
        filled[rank] += part.bytes
    return shares
