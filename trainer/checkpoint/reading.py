"""Reading a checkpoint: the parts of it that this rank wants, hashed while they are read.

A rank that wants all of a share reads it front to back and hashes it on the way. Of a share that no rank wants all of,
one rank reads and hashes everything and the others read their parts alone: the ranks then tell each other what they
found (restore.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from trainer.checkpoint.contents import Opened, Stored, Tensor
from trainer.checkpoint.damage import DamagedError, as_damage
from trainer.checkpoint.shards import Box
from trainer.checkpoint.targets import Target, read_all, read_some
from trainer.checkpoint.writing import bytes_of

Memory = Callable[[str, torch.dtype, tuple[int, ...]], "torch.Tensor | None"]
"""The memory that a tensor is read into, by (name, dtype, sizes); None if this rank does not want it."""


def fresh(_: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
    """Fresh memory for any tensor."""
    return torch.empty(sizes, dtype=dtype)


def read(
    opened: Opened, wanted: Mapping[str, Box], hashes: Callable[[str], bool], memory: Memory = fresh
) -> dict[str, torch.Tensor]:
    """Read the wanted boxes of tensors into host memory.

    Args:
        opened: The checkpoint.
        wanted: By name, the box that this rank wants; nothing is read of other tensors.
        hashes: Tells whether this rank has to hash a share, whatever it wants of it.
        memory: Returns the memory for each tensor.

    Raises:
        DamagedError: a share differs from the manifest.
        OSError: it cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    targets: dict[str, list[Target]] = {}
    afterwards: dict[str, list[Callable[[], None]]] = {}
    for name, box in sorted(wanted.items()):
        tensor = opened.tensors[name]
        if (target_memory := memory(name, tensor.dtype, box[1])) is None:
            continue
        found[name] = target_memory
        got = 0
        for stored, there, here, sizes in _overlaps(name, tensor, box):
            got += math.prod(sizes)
            target, afterward = _place(stored, tensor.dtype, there, found[name], here, sizes)
            if target.end > target.start:
                targets.setdefault(stored.file, []).append(target)
            if afterward:
                afterwards.setdefault(stored.file, []).append(afterward)
        if got != found[name].numel():
            raise DamagedError(f"{name[:80]}: {got} of {found[name].numel()} elements are in its shares")
    for file, header in sorted(opened.headers.items()):
        record, wants = opened.manifest.files[file], sorted(targets.get(file, []), key=lambda target: target.start)
        everything = sum(target.end - target.start for target in wants) >= record.bytes - len(header)
        with as_damage(file):
            if everything or hashes(file):
                read_all(opened.folder / file, file, record, header, wants)
            elif wants:
                read_some(opened.folder / file, file, wants)
        for afterward in afterwards.pop(file, []):
            afterward()
    return found


Overlap = tuple[Stored, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""(a stored part, offsets in it, offsets in the wanted box, sizes), by dimension."""


def _overlaps(name: str, tensor: Tensor, box: Box) -> Iterator[Overlap]:
    """The overlaps of a tensor's stored parts with a box, by DCP's resharding."""
    if len(tensor.parts) == 1 and tensor.parts[0].box == box:
        zeros = (0,) * len(tensor.shape)
        yield tensor.parts[0], zeros, zeros, box[1]
        return
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    def chunk(of: Box) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(of[0]), torch.Size(of[1]))

    known = TensorStorageMetadata(
        TensorProperties(tensor.dtype), torch.Size(tensor.shape), [chunk(stored.box) for stored in tensor.parts]
    )
    by_offsets = {stored.box[0]: stored for stored in tensor.parts}
    for item in create_read_items_for_chunk_list(name, known, [chunk(box)]):
        assert item.storage_index.offset is not None
        stored = by_offsets[tuple(item.storage_index.offset)]
        yield stored, tuple(item.storage_offsets), tuple(item.dest_offsets), tuple(item.lengths)


def _place(
    stored: Stored,
    dtype: torch.dtype,
    there: tuple[int, ...],
    wanted: torch.Tensor,
    here: tuple[int, ...],
    sizes: tuple[int, ...],
) -> tuple[Target, Callable[[], None] | None]:
    """(the bytes of the share to read and their target, what to do after reading, if anything).

    Rows that are whole in both are read straight to their place; otherwise the whole stored part is read first.
    """
    row = math.prod(sizes[1:]) * dtype.itemsize
    if sizes[1:] == stored.box[1][1:] == tuple(wanted.shape[1:]):
        first, count = (there[0], sizes[0]) if sizes else (0, 1)
        start = stored.start + first * row
        rows = wanted[here[0] : here[0] + count] if sizes else wanted
        return Target(start, start + count * row, bytes_of(rows).data), None
    part = torch.empty(stored.box[1], dtype=dtype)

    def put() -> None:
        source = part[tuple(slice(at, at + extent) for at, extent in zip(there, sizes, strict=True))]
        wanted[tuple(slice(at, at + extent) for at, extent in zip(here, sizes, strict=True))].copy_(source)

    memory = bytes_of(part).data
    return Target(stored.start, stored.start + len(memory), memory), put
