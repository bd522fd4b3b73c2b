"""A checkpoint on disk: shares of tensors, state.json, and last of all MANIFEST.json.

Each rank streams its own share once, front to back, into a new folder, hashing as it goes, so that it works on a mount
that knows no seek, no rename and no append. Rank 0 writes the manifest when it has every rank's word: a folder without
a readable manifest does not count, and one with it counts only if every file hashes to what the manifest says.

A share is a plain safetensors file. Nothing here unpickles anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.hashing import Hasher, hash_bytes
from trainer.layout import (
    MANIFEST,
    STATE,
    FileRecord,
    LayoutError,
    LayoutVersionError,
    Manifest,
    from_json,
    fsync,
    read_manifest,
    to_json,
    write_once,
)
from trainer.verify import NOT_THERE

CHUNK_BYTES = 8 << 20

POINTS = ("folder-made", "share-half", "share-written", "state-written", "manifest-half", "manifest-written")
"""Where a machine may be taken during a save; each is passed once a save, in this order, on rank 0."""

_DTYPES = {
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
SAVED_DTYPES = {dtype: name for name, dtype in _DTYPES.items()}


def _pass(point: str) -> None:
    """Nothing: tests put a kill in its place."""


at_point: Callable[[str], None] = _pass
"""Called with each of POINTS as a save passes it."""


class DamagedError(Exception):
    """A checkpoint is not whole; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Loaded:
    """A whole checkpoint in memory."""

    folder: Path
    manifest: Manifest
    tensors: dict[str, torch.Tensor]
    plain: dict[str, Any]


def deal(sizes: Mapping[str, int], ranks: int, rank0: Collection[str] = ()) -> list[list[str]]:
    """Which rank writes which tensor: each to the rank with the fewest bytes so far, the largest first.

    A pure function of names and sizes in bytes, so that all ranks agree without a word. `rank0` names what differs
    between ranks and counts as rank 0 has it (buffers: DistributedDataParallel sends rank 0's to the others).
    """
    shares: list[list[str]] = [[name for name in sorted(sizes) if name in rank0], *([] for _ in range(ranks - 1))]
    filled = [sum(sizes[name] for name in share) for share in shares]
    for name in sorted(sizes.keys() - set(rank0), key=lambda name: (-sizes[name], name)):
        rank = min(range(ranks), key=lambda candidate: (filled[candidate], candidate))
        shares[rank].append(name)
        filled[rank] += sizes[name]
    return shares


def copy_share(
    tensors: Mapping[str, torch.Tensor], rank: int, ranks: int, rank0: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """This rank's share of the tensors (see `deal`), copied to the host; contiguous."""
    mine = deal({name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}, ranks, rank0)[rank]
    return {
        name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
        for name in mine
    }


def share_name(rank: int) -> str:
    """The file of a rank's share."""
    return f"share-{rank:05d}.safetensors"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def write_share(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Stream tensors into a new safetensors file, front to back.

    Raises:
        OSError: a write, the fsync or the close failed.
    """
    # Wide types first, so that every tensor starts at a multiple of its item's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": SAVED_DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher, written, half = Hasher(), 0, False
    with path.open("xb", buffering=0) as file:

        def put(data: memoryview) -> None:
            nonlocal written, half
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                hasher.update(chunk)
                while chunk:
                    done = file.write(chunk)
                    written += done
                    chunk = chunk[done:]
                if not half and written >= offset // 2:
                    half = True
                    at_point("share-half")

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for name in names:
            put(_bytes_of(tensors[name]))
        fsync(file.fileno())
    return FileRecord(written, hasher.hexdigest())


def write_state(folder: Path, plain: Mapping[str, Any]) -> FileRecord:
    """Write state.json."""
    data = to_json(plain)
    write_once(folder / STATE, data)
    return FileRecord(len(data), hash_bytes(data))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json: with its close() the folder is committed."""
    data = manifest.to_json()
    with (folder / MANIFEST).open("xb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        at_point("manifest-half")
        file.write(data[len(data) // 2 :])
        file.flush()
        fsync(file.fileno())
    at_point("manifest-written")


def load(folder: Path) -> Loaded:
    """Read a whole checkpoint into host memory; one pass reads and hashes.

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
        folder.stat()
        raise DamagedError(str(error)) from None
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    if STATE not in manifest.files:
        raise DamagedError("its manifest lists no state.json")
    for name, record in manifest.files.items():
        data = _read_file(folder / name, name, record)
        try:
            if name == STATE:
                plain = from_json(bytes(data.numpy()))
            elif name.endswith(".safetensors"):
                tensors.update(_parse_share(data))
        except (LayoutError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DamagedError(f"{name}: {error}") from None
    if not isinstance(plain, dict):
        raise DamagedError("state.json is not an object")
    return Loaded(folder, manifest, tensors, plain)


def _read_file(path: Path, name: str, record: FileRecord) -> torch.Tensor:
    """The file's bytes as a uint8 tensor, hashed while they are read.

    Raises:
        DamagedError: the file is not as the manifest says.
        OSError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise DamagedError(f"{name} has {size} bytes, its manifest says {record.bytes}")
        data = torch.empty(size, dtype=torch.uint8)
        view, hasher, done = memoryview(data.numpy()) if size else memoryview(bytearray()), Hasher(), 0
        with path.open("rb", buffering=0) as file:
            while done < size:
                count = file.readinto(view[done : done + CHUNK_BYTES])
                if not count:
                    raise DamagedError(f"{name} ends after {done} of {size} bytes")
                hasher.update(view[done : done + count])
                done += count
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        raise DamagedError(f"{name}: {error.strerror}") from None
    if hasher.hexdigest() != record.hash:
        raise DamagedError(f"{name} does not hash to what its manifest says")
    return data


def _parse_share(data: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, as views of its bytes.

    Raises:
        DamagedError: the header does not describe the bytes.
    """
    total = data.numel()
    length = int.from_bytes(bytes(data[:8].numpy()), "little") if total >= 8 else -1
    if not 0 <= length <= total - 8:
        raise DamagedError("it is not a safetensors file")
    header = from_json(bytes(data[8 : 8 + length].numpy()))
    body = data[8 + length :]
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = 1
        for size in shape:
            if not isinstance(size, int) or size < 0:
                raise DamagedError(f"{name[:80]}: its shape cannot be {shape!r}")
            count *= size
        if not 0 <= start <= end <= body.numel() or end - start != count * dtype.itemsize:
            raise DamagedError(f"{name[:80]}: its bytes and its shape disagree")
        part = body[start:end]
        if (8 + length + start) % dtype.itemsize:
            part = part.clone()
        found[name] = part.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return found
