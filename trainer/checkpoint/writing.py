"""Writing a checkpoint's files: shares of tensors, state.json, and last of all MANIFEST.json.

Each rank streams its own share once, front to back, into a new folder, and hashes it on the way. So it works on a mount
that supports no seek, no rename and no append. Rank 0 writes the manifest when every rank has reported its share. A
folder counts only if it has a readable manifest and every file hashes to what the manifest says.

A share is a plain safetensors file. Nothing here unpickles anything.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.bucket.deadlines import within, within_bytes
from trainer.bucket.hashing import BLOCK, CHUNK_BYTES, Hasher, hash_bytes, turn_past_cache
from trainer.checkpoint.shards import Part
from trainer.layout.documents import fsync, to_json, write_once
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import MANIFEST, STATE

PARTS = "parts"
"""A key of a share's `__metadata__`: JSON of {tensor: [shape of the whole, offsets]}, for parts of tensors."""

READ_BYTES = 1 << 20
"""Bytes read at once from a local file: few enough to stay in the processor's cache until they are written."""
_WORTH_A_BLOCK = 1 << 20
"""The header of a share with at least so many bytes fills whole blocks."""

POINTS = ("folder-made", "share-half", "share-written", "state-written", "manifest-half", "manifest-written")
"""Points of a save at which tests kill a machine; rank 0 passes each once a save, in this order."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SAVED_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


def _pass(point: str) -> None:
    """Do nothing; tests put a kill in its place."""


_SYNC_FILE_RANGE_WRITE = 2
try:
    _sync_file_range: Any = ctypes.CDLL(None).sync_file_range
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
except (OSError, AttributeError):
    _sync_file_range = None  # Only Linux has it.

at_point: Callable[[str], None] = _pass
"""Called with each of POINTS as a save passes it."""


def share_name(rank: int) -> str:
    """The file of a rank's share."""
    return f"share-{rank:05d}.safetensors"


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Stream whole tensors, from wherever they are, into a new safetensors file; errors as of `write_share`."""
    parts = [
        Part(name, tensor.dtype, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape), (0,))
        for name, tensor in tensors.items()
    ]
    return write_share(path, parts, lambda part: tensors[part.name].detach().cpu().contiguous(), metadata=metadata)


def write_share(
    path: Path,
    parts: Sequence[Part],
    fetch: Callable[[Part], torch.Tensor | FileIO],
    staged: memoryview | None = None,
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Stream parts of tensors into a new safetensors file, front to back; at most one part of each tensor.

    Args:
        path: The file.
        parts: The parts to write.
        fetch: Returns the contents of a part, on the host and contiguous, or an open file of its bytes; called for one
            part after the other.
        staged: The contents of the first parts (in_order), side by side, from the start of a page of memory. They are
            written past the system's cache, if the file system supports that.
        metadata: Further metadata for the file's header.

    Raises:
        OSError: a write, the fsync or the close failed, or a file could not be read.
    """
    parts = in_order(parts)
    text, offset = _header(parts, metadata)
    hasher, half = Hasher(), False
    with within("opening a share"):
        file = _NewFile(path, past_cache=bool(staged))
    try:
        for data in _pieces(text, parts, fetch, staged):
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                hasher.update(chunk)
                file.write(chunk)
                if not half and file.written >= offset // 2:
                    half = True
                    at_point("share-half")
        with within_bytes("an fsync", file.written):
            fsync(file.descriptor)
    except BaseException:
        with within_bytes("a close", file.written), suppress(OSError):  # The first error counts.
            os.close(file.descriptor)
        raise
    with within_bytes("a close", file.written):
        os.close(file.descriptor)
    return FileRecord(file.written, hasher.hexdigest())


def _pieces(
    text: bytes, parts: Sequence[Part], fetch: Callable[[Part], torch.Tensor | FileIO], staged: memoryview | None
) -> Iterator[memoryview]:
    """The bytes of a share in pieces, front to back."""
    opening = paged_memory(len(text))
    opening[:] = text
    yield opening
    at = 0
    if staged:
        yield staged
    for part in parts:
        at += part.bytes
        if not staged or at > len(staged):
            found = fetch(part)
            if isinstance(found, FileIO):
                yield from _read(found, part.bytes)
            else:
                yield bytes_of(found).data


def _read(file: FileIO, count: int) -> Iterator[memoryview]:
    """The first `count` bytes of a file in pieces, each in the same memory.

    A mapped file would count as the process's memory while it is written.
    """
    buffer, left = paged_memory(min(count, READ_BYTES)), count
    file.seek(0)
    while left:
        got = int(file.readinto(buffer[:left]) or 0)
        if not got:
            raise OSError(errno.EIO, f"{file.name!r} has lost its last {left} bytes")
        left -= got
        yield buffer[:got]


def paged_memory(count: int) -> memoryview:
    """Fresh memory that begins at a page."""
    return memoryview(mmap.mmap(-1, max(1, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:count]


class _NewFile:
    """A file that is written once, front to back.

    A write past the system's cache costs no processor time, and the fsync has nothing left to do. But it takes whole
    blocks, in memory and in the file, and not every file system supports it.
    """

    def __init__(self, path: Path, past_cache: bool) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.written = 0
        self._past_cache = past_cache and turn_past_cache(self.descriptor, True)

    def write(self, data: memoryview) -> None:
        while data:
            piece = data[: len(data) // BLOCK * BLOCK] if self._past_cache else data
            if not piece:
                self._past_cache = turn_past_cache(self.descriptor, False)
                continue
            try:
                with within("a write"):
                    done = os.write(self.descriptor, piece)
                    if not self._past_cache:
                        _begin_write_back(self.descriptor, self.written, done)
            except OSError as error:
                if not self._past_cache or error.errno != errno.EINVAL:
                    raise
                self._past_cache = turn_past_cache(self.descriptor, False)
                continue
            if not done:
                raise OSError(errno.EIO, "a write of nothing")
            self.written += done
            data = data[done:]


def _begin_write_back(descriptor: int, start: int, count: int) -> None:
    """Ask the system to begin writing to disk now, instead of all at once at the fsync. A hint."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, start, count, _SYNC_FILE_RANGE_WRITE)


def in_order(parts: Sequence[Part]) -> list[Part]:
    """The order of parts in a share: wide types first, so that each starts at a multiple of its item's size."""
    return sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name))


def _header(parts: Sequence[Part], metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """(the opening bytes of a safetensors file, the number of bytes that follow)."""
    header: dict[str, Any] = {}
    offset = 0
    for part in parts:
        end = offset + part.bytes
        header[part.name] = {
            "dtype": SAVED_DTYPES[part.dtype], "shape": list(part.sizes), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    partial = {part.name: [list(part.shape), list(part.offsets)] for part in parts if not part.whole}
    more = {PARTS: json.dumps(partial, separators=(",", ":"))} if partial else {}
    if metadata or more:
        header["__metadata__"] = {**(metadata or {}), **more}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % (BLOCK if offset >= _WORTH_A_BLOCK else 8))
    return len(text).to_bytes(8, "little") + text, offset


def write_state(folder: Path, plain: Mapping[str, Any]) -> FileRecord:
    """Write state.json."""
    data = to_json(plain)
    with within_bytes("writing state.json", len(data)):
        write_once(folder / STATE, data)
    return FileRecord(len(data), hash_bytes(data))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json; its close() commits the folder."""
    data = manifest.to_json()
    with within_bytes("writing MANIFEST.json", len(data)), (folder / MANIFEST).open("xb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        at_point("manifest-half")
        file.write(data[len(data) // 2 :])
        file.flush()
        fsync(file.fileno())
    at_point("manifest-written")
