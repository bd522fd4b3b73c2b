"""Who holds which part of which tensor, and who writes it: the same on every rank, without a word between the ranks.

A plain tensor is whole on every rank, and one of them writes it. A DTensor (FSDP2's `fully_shard`, tensor parallelism)
is cut over a mesh of ranks; each rank writes what it holds, and of a part that several hold one writes it. Parts are
dealt before anything is copied, so that a node stages one copy of the state however many ranks run there.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainer.errors import TrainerError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins in its tensor, and its extent, in elements by dimension."""


class ShardError(TrainerError):
    """A tensor's layout over the ranks cannot be saved; the message names it."""


@dataclass(frozen=True)
class Part:
    """A box of a tensor that some ranks hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    holders: Sequence[int]
    """The ranks that have it."""

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.sizes == self.shape


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Their module takes half a second to import: where it is not loaded, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor; no copy."""
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
    """What this rank holds of a tensor."""
    if is_cut(tensor):
        return boxes(tensor)[rank]
    return (0,) * tensor.ndim, tuple(tensor.shape)


def like(whole: DTensor, part: torch.Tensor) -> DTensor:
    """This rank's part of a tensor that is cut as another one is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def parts_of(tensors: Mapping[str, torch.Tensor], ranks: int, rank0: Collection[str] = ()) -> list[Part]:
    """Every part of every tensor, by name and place.

    Args:
        tensors: Alike on all ranks in names, shapes and layouts.
        ranks: How many there are.
        rank0: Names of what differs between ranks and counts as rank 0 has it.

    Raises:
        ShardError: a tensor's parts are yet to be summed, or are held by no rank of this run.
    """
    found = []
    for name, tensor in sorted(tensors.items()):
        shape = tuple(tensor.shape)
        if not is_cut(tensor):
            holders: Sequence[int] = (0,) if name in rank0 else range(ranks)
            found.append(Part(name, tensor.dtype, shape, (0,) * len(shape), shape, holders))
            continue
        if any(placement.is_partial() for placement in tensor.placements):
            raise ShardError(f"{name}: each rank holds a summand of it; redistribute it before it is saved")
        held: dict[Box, list[int]] = {}
        for rank, box in boxes(tensor).items():
            held.setdefault(box, []).append(rank)
        # Ranks beyond the last row hold nothing, unless there is nothing to hold.
        full = {box: by for box, by in held.items() if math.prod(box[1])} or dict(list(held.items())[:1])
        if sum(math.prod(sizes) for _, sizes in full) != math.prod(shape):
            raise ShardError(f"{name}: what the ranks hold of it does not make up the whole")
        found += [Part(name, tensor.dtype, shape, *box, sorted(by)) for box, by in sorted(full.items())]
    return found


def deal(parts: Sequence[Part], ranks: int) -> list[list[Part]]:
    """Which rank writes which part: the largest first, each to the one of its holders with the fewest bytes so far."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for part in sorted(parts, key=lambda part: (len(part.holders) > 1, -part.bytes, part.name, part.offsets)):
        rank = min(part.holders, key=lambda holder: (filled[holder], holder))
        shares[rank].append(part)
        filled[rank] += part.bytes
    return shares
