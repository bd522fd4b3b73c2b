"""The contents of a checkpoint: its manifest, its state.json, and the place of each tensor's parts in its shares.

Nothing that is read is trusted: sizes and places are checked before memory is allocated.
"""

from __future__ import annotations

import itertools
import math
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trainer.bucket.deadlines import read_manifest, within
from trainer.bucket.hashing import hash_bytes
from trainer.checkpoint.damage import DamagedError, as_damage
from trainer.checkpoint.shards import Box
from trainer.checkpoint.targets import Target, read_all
from trainer.checkpoint.writing import DTYPES, PARTS
from trainer.layout.documents import MAX_JSON_BYTES, LayoutError, LayoutVersionError, from_json
from trainer.layout.identity import missing_facts
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import STATE, is_safe_name

_MAX_DIMS = 64
PartsByTensor = dict[str, list[tuple[torch.dtype, list[int], "Stored"]]]
"""(dtype, shape of the whole, place) of each part, by tensor."""


@dataclass(frozen=True)
class Stored:
    """A part of a tensor in a share."""

    file: str
    start: int
    """The position of its first byte in the file."""
    box: Box


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Stored, ...]


@dataclass(frozen=True)
class Opened:
    """A checkpoint before its tensors are read."""

    folder: Path
    manifest: Manifest
    plain: dict[str, Any]
    tensors: dict[str, Tensor]
    headers: dict[str, bytes] = field(repr=False)
    """The header of each share, which describes its tensors."""

    @property
    def digest(self) -> str:
        """The same on all ranks that read the same."""
        return hash_bytes(b"".join(text for _, text in sorted(self.headers.items())))


def open_checkpoint(folder: Path) -> Opened:
    """Read a checkpoint's manifest, its state.json and its shares' headers; check the size of every file.

    Raises:
        DamagedError: it is not committed, or not whole.
        LayoutVersionError: a newer release wrote it.
        FileNotFoundError: the folder is gone (pruned by another attempt meanwhile).
        OSError: it cannot be read; it may be whole.
    """
    try:
        manifest = read_manifest(folder)
    except LayoutVersionError:
        raise
    except LayoutError as error:
        with within("looking for a folder"):
            folder.stat()
        raise DamagedError(str(error)) from None
    if missing := missing_facts(folder.name, manifest):
        raise DamagedError(missing)
    if not _is_history(manifest.facts.get("metrics", [])):
        raise DamagedError("its manifest's list of metrics files is malformed")
    headers: dict[str, bytes] = {}
    found: PartsByTensor = {}
    for name, record in sorted(manifest.files.items()):
        with as_damage(name), within(f"reading {name}"):
            found_there = (folder / name).stat()
            size = found_there.st_size
            if not stat.S_ISREG(found_there.st_mode):  # Opening a pipe would block for ever.
                raise DamagedError(f"{name} is not a file")
            if other := record.size_problem(name, size):
                raise DamagedError(other)
            if name.endswith(".safetensors"):
                with (folder / name).open("rb", buffering=0) as file:
                    headers[name] = _header(file, size)
                _add_parts(headers[name], name, size, found)
    plain = _read_state(folder, manifest.files[STATE])
    return Opened(folder, manifest, plain, _assembled(found), headers)


def _is_history(metrics: object) -> bool:
    """True if it is a list of metrics files, as the layout defines it."""
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
        raise DamagedError(f"state.json has {record.bytes} bytes, too many to be valid")
    data = bytearray(record.bytes)
    with as_damage(STATE):
        read_all(folder / STATE, STATE, record, b"", [Target(0, len(data), memoryview(data))])
        plain = from_json(bytes(data))
    if not isinstance(plain, dict):
        raise DamagedError("state.json is not an object")
    return plain


def _header(file: BinaryIO, size: int) -> bytes:
    """The first bytes of a safetensors file: the length of its header, and its header."""
    first = file.read(8)
    length = int.from_bytes(first, "little") if len(first) == 8 else -1
    if not 0 <= length <= min(size - 8, MAX_JSON_BYTES):
        raise DamagedError("it is not a safetensors file")
    text = bytearray(first)
    while len(text) < 8 + length:
        more = file.read(8 + length - len(text))
        if not more:
            raise DamagedError("it is cut off within its header")
        text += more
    return bytes(text)


def _add_parts(text: bytes, file: str, size: int, found: PartsByTensor) -> None:
    """Add the parts that a share's header names to `found`."""
    header, body = from_json(text[8:]), size - len(text)
    partial = from_json(header.pop("__metadata__", {}).get(PARTS, "{}").encode())
    for name, entry in header.items():
        dtype, sizes, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        shape, offsets = partial.get(name, [sizes, [0] * len(sizes)])
        if not len(sizes) == len(shape) == len(offsets) <= _MAX_DIMS or not all(
            _is_count(number) for number in (*sizes, *shape, *offsets, start, end)
        ):
            raise DamagedError(f"{name[:80]}: invalid shape {str(sizes)[:80]}")
        if any(math.prod(max(1, n) for n in of) * dtype.itemsize >= 1 << 63 for of in (sizes, shape)):
            raise DamagedError(f"{name[:80]}: invalid shape {str(shape)[:80]}")
        if any(at + extent > whole for at, extent, whole in zip(offsets, sizes, shape, strict=True)):
            raise DamagedError(f"{name[:80]}: a part lies outside the tensor")
        if not start <= end <= body or end - start != math.prod(sizes) * dtype.itemsize:
            raise DamagedError(f"{name[:80]}: its size in bytes does not match its shape")
        stored = Stored(file, len(text) + start, (tuple(offsets), tuple(sizes)))
        found.setdefault(name, []).append((dtype, shape, stored))


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _assembled(found: PartsByTensor) -> dict[str, Tensor]:
    """The tensors, from the parts in all shares.

    Raises:
        DamagedError: the parts of a tensor do not make up the whole, each element once.
    """
    tensors = {}
    for name, parts in found.items():
        dtype, shape, _ = parts[0]
        if any(other[:2] != (dtype, shape) for other in parts):
            raise DamagedError(f"{name[:80]}: its shares disagree on its type or shape")
        by_place = sorted((stored for _, _, stored in parts), key=lambda stored: stored.box)
        volume = sum(math.prod(stored.box[1]) for stored in by_place)
        if volume != math.prod(shape) or not _is_grid([stored.box for stored in by_place]):
            raise DamagedError(f"{name[:80]}: its parts do not cover the tensor exactly once")
        tensors[name] = Tensor(dtype, tuple(shape), tuple(by_place))
    return tensors


def _is_grid(boxes: Sequence[Box]) -> bool:
    """True if boxes are distinct cells of a grid, so that none overlap. The parts of a saved tensor always are."""
    if len({offsets for offsets, _ in boxes}) != len(boxes):
        return False
    for dimension in range(len(boxes[0][0])):
        cuts = sorted({(offsets[dimension], offsets[dimension] + sizes[dimension]) for offsets, sizes in boxes})
        if any(end > start for (_, end), (start, _) in itertools.pairwise(cuts)):
            return False
    return True
