"""The readers of safetensors, npy and npz files, without torch and numpy. Nothing is unpickled."""

from __future__ import annotations

import ast
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from skyspot.rehearsal.compare.rules import FormatError
from skyspot.rehearsal.compare.tensors import Entry, Tensor, pieces_of

LARGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself allows."""
_SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
_NUMPY = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}
Opener = Callable[[], IO[bytes]]


def read_safetensors(path: Path) -> list[Entry]:
    """List the tensors of a safetensors file, and the texts of its metadata.

    Raises:
        FormatError: it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise FormatError("no safetensors file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries: list[Entry] = [((name,), metadata[name]) for name in sorted(metadata)]
        for name in sorted(header):
            start, end = header[name]["data_offsets"]
            dtype = _SAFETENSORS.get(header[name]["dtype"], header[name]["dtype"])
            pieces = _from(lambda: path.open("rb"), 8 + length + start, end - start)
            entries.append(((name,), Tensor(dtype, tuple(header[name]["shape"]), pieces)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError("no safetensors file") from None
    return entries


def read_npz(path: Path) -> list[Entry]:
    """List the arrays of an npz file.

    Raises:
        FormatError: it is no npz file, or holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
        return [
            ((name.removesuffix(".npy"),), _array(lambda name=name: zipfile.ZipFile(path).open(name)))  # type: ignore[misc]
            for name in names
        ]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
        raise FormatError("no npz file") from None


def read_npy(path: Path) -> list[Entry]:
    """List the array of an npy file.

    Raises:
        FormatError: it is no npy file, or holds Python objects.
    """
    return [((), _array(lambda: path.open("rb")))]


def _array(opener: Opener) -> Tensor:
    """Read the header of an array in numpy's format (numpy.lib.format)."""
    with opener() as file:
        if file.read(6) != b"\x93NUMPY":
            raise FormatError("no array of numpy's")
        wide = file.read(2)[:1] > b"\x01"
        length = int.from_bytes(file.read(4 if wide else 2), "little")
        start = (12 if wide else 10) + length
        try:
            if length > LARGEST_HEADER:
                raise ValueError
            header = ast.literal_eval(file.read(length).decode("utf-8" if wide else "latin-1"))
            return _tensor(header["descr"], header["shape"], bool(header["fortran_order"]), opener, start)
        except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
            raise FormatError("no array of numpy's") from None


def _tensor(descr: Any, shape: tuple[int, ...], fortran: bool, opener: Opener, start: int) -> Tensor:
    found = re.fullmatch(r"([<>|=])([a-zA-Z])(\d+)(.*)", str(descr))
    if not found or found[2] == "O":
        raise FormatError("has Python objects or records")
    size = int(found[3]) * (4 if found[2] == "U" else 1)
    kind = _NUMPY.get(found[2])
    dtype = ("bool" if kind == "bool" else f"{kind}{size * 8}") if kind else str(descr)
    order = ">" if found[1] == ">" else "<"
    return Tensor(dtype, tuple(shape), _from(opener, start, math.prod(shape) * size), order, fortran)


def _from(opener: Opener, start: int, size: int) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        try:
            with opener() as file:
                file.seek(start)
                yield from pieces_of(file.read, size)
        except (zipfile.BadZipFile, zipfile.zlib.error, struct.error):  # type: ignore[attr-defined]
            raise FormatError("a tensor cannot be read") from None

    return pieces
