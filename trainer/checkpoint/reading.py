"""A checkpoint read back: what is in it, and the parts of it that this rank wants, hashed while they are read.

A rank that wants all of a share reads it front to back and hashes it on the way. Of a share that no rank wants all of,
one rank reads and hashes everything and the others read their parts alone: the ranks then tell each other what they
found (restore.py). Nothing that is read is trusted: sizes and places are checked before memory is asked for.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trainer.bucket.deadlines import opened, read_manifest, within
from trainer.bucket.hashing import CHUNK_BYTES, Hasher, hash_bytes
from trainer.checkpoint.shards import Box
from trainer.checkpoint.writing import DTYPES, PARTS
from trainer.layout.documents import MAX_JSON_BYTES, LayoutError, LayoutVersionError, from_json, says_not_there
from trainer.layout.identity import belongs
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import STATE, CheckpointName, is_safe_name

_MAX_DIMS = 64
_VIEWS = 256
"""Pieces of memory that one read may fill."""


class DamagedError(Exception):
    """A checkpoint is not whole; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Stored:
    """A part of a tensor in a share."""

    file: str
    start: int
    """Its first byte in the file."""
    box: Box


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Stored, ...]


@dataclass(frozen=True)
class Opened:
    """What is known of a checkpoint before its tensors are read."""

    folder: Path
    manifest: Manifest
    plain: dict[str, Any]
    tensors: dict[str, Tensor]
    headers: dict[str, bytes] = field(repr=False)
    """How each share opens: what the tensors are known from."""

    @property
    def digest(self) -> str:
        """The same on all ranks that read the same."""
        return hash_bytes(b"".join(text for _, text in sorted(self.headers.items())))


@dataclass(frozen=True)
class _Target:
    """Bytes of a share, and where they go."""

    start: int
    end: int
    memory: memoryview


def open_checkpoint(folder: Path) -> Opened:
    """Read a checkpoint's manifest, its state.json and how its shares open; see that every file has its size.

    Raises:
        DamagedError: it is not committed, or not whole.
        LayoutVersionError: a newer release wrote it.
        FileNotFoundError: the folder is gone (pruned by another attempt meanwhile).
        OSError: it cannot be read, which says nothing of whether it is whole.
    """
    try:
        manifest = read_manifest(folder)
    except LayoutVersionError:
        raise
    except LayoutError as error:
        with within("looking for a folder"):
            folder.stat()
        raise DamagedError(str(error)) from None
    named = CheckpointName.parse(folder.name)
    if named and not belongs(manifest, named):
        raise DamagedError("its manifest is another checkpoint's")
    if STATE not in manifest.files:
        raise DamagedError("its manifest lists no state.json")
    if not _is_history(manifest.facts.get("metrics", [])):
        raise DamagedError("its manifest's list of metrics cannot be one")
    headers, found = {}, {}
    for name, record in sorted(manifest.files.items()):
        with _damage(name), within(f"reading {name}"):
            found_there = (folder / name).stat()
            size = found_there.st_size
            if not stat.S_ISREG(found_there.st_mode):  # Opening a pipe would wait for ever.
                raise DamagedError(f"{name} is not a file")
            if size != record.bytes:
                raise DamagedError(f"{name} has {size} bytes, its manifest says {record.bytes}")
            if name.endswith(".safetensors"):
                with (folder / name).open("rb", buffering=0) as file:
                    headers[name] = _header(file, size)
                _understand(headers[name], name, size, found)
    plain = _read_state(folder, manifest.files[STATE])
    return Opened(folder, manifest, plain, _assembled(found), headers)


def read(opened: Opened, wanted: Mapping[str, Box], hashes: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The wanted boxes of tensors, in fresh host memory.

    Args:
        opened: The checkpoint.
        wanted: By name, the box that this rank wants; of others nothing is read.
        hashes: Whether this rank is the one that hashes a share, whatever it wants of it.

    Raises:
        DamagedError: a share is not as the manifest says.
        OSError: it cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    targets: dict[str, list[_Target]] = {}
    afterwards: dict[str, list[Callable[[], None]]] = {}
    for name, box in sorted(wanted.items()):
        tensor = opened.tensors[name]
        found[name] = torch.empty(box[1], dtype=tensor.dtype)
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
        with _damage(file):
            if everything or hashes(file):
                _read_all(opened.folder / file, file, record, header, wants)
            elif wants:
                _read_some(opened.folder / file, file, wants)
        for afterward in afterwards.pop(file, []):
            afterward()
    return found


# -- what is in it -----------------------------------------------------------------------------------------------------


def _is_history(metrics: object) -> bool:
    """Whether it lists files of metrics, as layout.py says."""
    return isinstance(metrics, list) and all(
        isinstance(part, dict)
        and isinstance(part.get("path"), str)
        and is_safe_name(part["path"])
        and isinstance(part.get("hash"), str)
        and all(_is_count(part.get(key)) for key in ("bytes", "first_step", "last_step"))
        for part in metrics
    )


def _read_state(folder: Path, record: FileRecord) -> dict[str, Any]:
    if record.bytes > MAX_JSON_BYTES:
        raise DamagedError(f"state.json of {record.bytes} bytes cannot be one")
    data = bytearray(record.bytes)
    with _damage(STATE):
        _read_all(folder / STATE, STATE, record, b"", [_Target(0, len(data), memoryview(data))])
        plain = from_json(bytes(data))
    if not isinstance(plain, dict):
        raise DamagedError("state.json is not an object")
    return plain


def _header(file: BinaryIO, size: int) -> bytes:
    """The first bytes of a safetensors file: its header's length, and its header."""
    first = file.read(8)
    length = int.from_bytes(first, "little") if len(first) == 8 else -1
    if not 0 <= length <= min(size - 8, MAX_JSON_BYTES):
        raise DamagedError("it is not a safetensors file")
    text = bytearray(first)
    while len(text) < 8 + length:
        more = file.read(8 + length - len(text))
        if not more:
            raise DamagedError("it ends in its header")
        text += more
    return bytes(text)


def _understand(
    text: bytes, file: str, size: int, found: dict[str, list[tuple[torch.dtype, list[int], Stored]]]
) -> None:
    """Enter the parts that a share's header names into `found`: (dtype, shape of the whole, place) by tensor."""
    header, body = from_json(text[8:]), size - len(text)
    partial = from_json(header.pop("__metadata__", {}).get(PARTS, "{}").encode())
    for name, entry in header.items():
        dtype, sizes, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        shape, offsets = partial.get(name, [sizes, [0] * len(sizes)])
        if not len(sizes) == len(shape) == len(offsets) <= _MAX_DIMS or not all(
            _is_count(number) for number in (*sizes, *shape, *offsets, start, end)
        ):
            raise DamagedError(f"{name[:80]}: its shape cannot be {str(sizes)[:80]}")
        if any(math.prod(max(1, n) for n in of) * dtype.itemsize >= 1 << 63 for of in (sizes, shape)):
            raise DamagedError(f"{name[:80]}: no tensor has the shape {str(shape)[:80]}")
        if any(at + extent > whole for at, extent, whole in zip(offsets, sizes, shape, strict=True)):
            raise DamagedError(f"{name[:80]}: a part of it lies outside of it")
        if not start <= end <= body or end - start != math.prod(sizes) * dtype.itemsize:
            raise DamagedError(f"{name[:80]}: its bytes and its shape disagree")
        stored = Stored(file, len(text) + start, (tuple(offsets), tuple(sizes)))
        found.setdefault(name, []).append((dtype, shape, stored))


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _assembled(found: Mapping[str, list[tuple[torch.dtype, list[int], Stored]]]) -> dict[str, Tensor]:
    """The tensors, of the parts that all shares name; all of each is there, once."""
    tensors = {}
    for name, parts in found.items():
        dtype, shape, _ = parts[0]
        if any(other[:2] != (dtype, shape) for other in parts):
            raise DamagedError(f"{name[:80]}: its shares disagree on its type or shape")
        by_place = sorted((stored for _, _, stored in parts), key=lambda stored: stored.box)
        volume = sum(math.prod(stored.box[1]) for stored in by_place)
        if volume != math.prod(shape) or not _is_grid([stored.box for stored in by_place]):
            raise DamagedError(f"{name[:80]}: its parts do not make up the whole")
        tensors[name] = Tensor(dtype, tuple(shape), tuple(by_place))
    return tensors


def _is_grid(boxes: Sequence[Box]) -> bool:
    """Whether boxes are cells of a grid, each once: then none overlap. All parts that are written here are."""
    if len({offsets for offsets, _ in boxes}) != len(boxes):
        return False
    for dimension in range(len(boxes[0][0])):
        cuts = sorted({(offsets[dimension], offsets[dimension] + sizes[dimension]) for offsets, sizes in boxes})
        if any(end > start for (_, end), (start, _) in itertools.pairwise(cuts)):
            return False
    return True


# -- where it goes -----------------------------------------------------------------------------------------------------

Overlap = tuple[Stored, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""(a stored part, where in it, where in what is wanted, how much), by dimension."""


def _overlaps(name: str, tensor: Tensor, box: Box) -> Iterator[Overlap]:
    """What of a tensor's stored parts falls into a box: DCP's resharding."""
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
) -> tuple[_Target, Callable[[], None] | None]:
    """Which bytes of the share to read, to where, and what to do when they are there.

    Rows that are whole in both are read straight to their place; anything else by way of the whole stored part.
    """
    row = math.prod(sizes[1:]) * dtype.itemsize
    if sizes[1:] == stored.box[1][1:] == tuple(wanted.shape[1:]):
        first, count = (there[0], sizes[0]) if sizes else (0, 1)
        start = stored.start + first * row
        rows = wanted[here[0] : here[0] + count] if sizes else wanted
        return _Target(start, start + count * row, _memory(rows)), None
    part = torch.empty(stored.box[1], dtype=dtype)

    def put() -> None:
        source = part[tuple(slice(at, at + extent) for at, extent in zip(there, sizes, strict=True))]
        wanted[tuple(slice(at, at + extent) for at, extent in zip(here, sizes, strict=True))].copy_(source)

    memory = _memory(part)
    return _Target(stored.start, stored.start + len(memory), memory), put


def _memory(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(bytearray())
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_all(path: Path, name: str, record: FileRecord, header: bytes, targets: Sequence[_Target]) -> None:
    """Read a file front to back, hash it, and keep what is wanted.

    Raises:
        DamagedError: it is not as the manifest says.
        OSError: it cannot be read.
    """
    scratch = memoryview(bytearray(min(CHUNK_BYTES, record.bytes)))
    opening = memoryview(bytearray(len(header)))
    pieces = _pieces([_Target(0, len(header), opening), *targets], record.bytes, scratch)
    hasher, done = Hasher(), 0
    with opened(path, name) as file:
        views: list[memoryview] = []
        for piece in pieces:
            if piece.obj is scratch.obj and any(view.obj is scratch.obj for view in views):
                done += _fill(file, name, views, done, record.bytes, hasher)
                views = []
            views.append(piece)
            if len(views) == _VIEWS or sum(map(len, views)) >= CHUNK_BYTES:
                done += _fill(file, name, views, done, record.bytes, hasher)
                views = []
        done += _fill(file, name, views, done, record.bytes, hasher)
    if bytes(opening) != header:
        raise DamagedError(f"{name} opens in another way than a moment ago")
    if hasher.hexdigest() != record.hash:
        raise DamagedError(f"{name} does not hash to what its manifest says")


def _pieces(targets: Sequence[_Target], size: int, scratch: memoryview) -> Iterator[memoryview]:
    """Memory for the bytes of a file, front to back, CHUNK_BYTES at most at a time; `scratch` for what is not wanted.

    Raises:
        DamagedError: two targets want the same bytes.
    """
    at = 0
    for target in [*targets, _Target(size, size, scratch[:0])]:
        if target.start < at:
            raise DamagedError("two tensors lie in the same bytes")
        for length in _cut(target.start - at):
            yield scratch[:length]
        for start in range(0, target.end - target.start, CHUNK_BYTES):
            yield target.memory[start : start + CHUNK_BYTES]
        at = target.end


def _cut(length: int) -> Iterator[int]:
    while length > 0:
        yield min(length, CHUNK_BYTES)
        length -= CHUNK_BYTES


def _read_some(path: Path, name: str, targets: Sequence[_Target]) -> None:
    """Read what is wanted of a file that another rank hashes."""
    with opened(path, name) as file:
        for target in targets:
            file.seek(target.start)
            done = 0
            for start in range(0, len(target.memory), CHUNK_BYTES):
                views = [target.memory[start : start + CHUNK_BYTES]]
                done += _fill(file, name, views, target.start + done, target.end)


def _fill(
    file: BinaryIO, name: str, views: Sequence[memoryview], done: int, size: int, hasher: Hasher | None = None
) -> int:
    """Fill pieces of memory from a file, one after the other; how many bytes that was."""
    left = [view for view in views if len(view)]
    total = sum(map(len, left))
    while left:
        with within(f"reading {name}"):
            count = os.readv(file.fileno(), left)
        if not count:
            raise DamagedError(f"{name} ends after {done + total - sum(map(len, left))} of {size} bytes")
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    for view in views:
        if hasher:
            hasher.update(view)
    return total


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Tells what says that a file is not as it was written from what says nothing of it."""
    try:
        yield
    except OSError as error:
        if not says_not_there(error):
            raise
        raise DamagedError(f"{name}: {error.strerror}") from None
    except DamagedError as error:
        raise DamagedError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except (LayoutError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise DamagedError(f"{name}: {str(error)[:200]}") from None
