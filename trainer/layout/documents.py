"""Documents of the layout: JSON, sealed with a hash of itself, written once, and checked when read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError

LAYOUT_VERSION = 1
MAX_JSON_BYTES = 256 << 20
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


class LayoutError(TrainerError):
    """A file in a run's folder violates the layout: it is torn, tampered with, or written by a newer release."""


class LayoutVersionError(LayoutError):
    """A file was written by a release whose layout is newer than this one's."""


def to_json(value: Any) -> bytes:
    """JSON as this layout writes it: ASCII, without NaN (write None instead)."""
    return json.dumps(value, indent=1, allow_nan=False).encode("ascii")


def sealed(document: Mapping[str, Any]) -> bytes:
    """A JSON object with a hash of itself, for a manifest: no other file has its hash."""
    document = {key: document[key] for key in document if key != "seal"}
    return to_json({**document, "seal": _seal(json.loads(to_json(document)))})


def check_seal(document: Mapping[str, Any]) -> None:
    """Check the hash of itself that an object carries, if it does.

    Raises:
        LayoutError: the object is not as it was written.
    """
    rest = {key: document[key] for key in document if key != "seal"}
    try:
        broken = len(rest) < len(document) and document["seal"] != _seal(rest)
    except (RecursionError, ValueError) as error:
        raise LayoutError(f"not in this layout's format ({error})") from None
    if broken:
        raise LayoutError("it does not match its own hash")


def _seal(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def from_json(data: bytes, *, allows_nan: bool = False) -> Any:
    """JSON as this layout reads it.

    Args:
        data: The JSON.
        allows_nan: Read NaN and infinity as None, instead of failing. Records are read so: a program other than the
            trainer may have written them, with a loss of NaN.

    Raises:
        LayoutError: it is not JSON, has NaN, infinity or a duplicate key, or is nested too deeply.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise LayoutError("it has a duplicate key")
        return found

    def constant(name: str) -> None:
        if not allows_nan:
            raise LayoutError(f"{name} is not allowed")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"not readable as JSON ({error})") from None


def read_json(path: Path, *, allows_nan: bool = False) -> dict[str, Any]:
    """The JSON object in a file; `allows_nan` as of `from_json`.

    Raises:
        LayoutError: the file is no JSON object, or is too large.
        OSError: the file cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise LayoutError(f"{path.name}: too large")
    document = from_json(path.read_bytes(), allows_nan=allows_nan)
    if not isinstance(document, dict):
        raise LayoutError(f"{path.name}: not a JSON object")
    return document


def write_once(path: Path, data: bytes) -> None:
    """Write a new file front to back, never over an old one: no mount that SkyPilot uses does that safely.

    Raises:
        FileExistsError: the file exists.
        OSError: the write, the fsync or the close failed; part of the file may exist.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        fsync(file.fileno())


def fsync(descriptor: int) -> None:
    """Fsync if the file system supports it; some FUSE mounts and pipes answer EINVAL or ENOTSUP."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def check_version(document: Mapping[str, Any]) -> None:
    """Refuse a document that a newer release wrote.

    Raises:
        LayoutVersionError: the layout is newer.
        LayoutError: the document has no version.
    """
    version = document.get("layout_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise LayoutError("it has no layout version")
    if version > LAYOUT_VERSION:
        raise LayoutVersionError(
            f"written with layout version {version}; this release reads up to {LAYOUT_VERSION}. Upgrade skyspot."
        )


def read_whole(path: Path) -> bytes:
    """The contents of a small file.

    Raises:
        LayoutError: the file is too large.
        OSError: the file cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise LayoutError("too large")
    return path.read_bytes()


def says_not_there(error: OSError) -> bool:
    """True if an error means that the file is missing or replaced; any other error says nothing about the file."""
    # Errors of a bucket without a mount have no number.
    return error.errno in _NOT_THERE or isinstance(error, FileNotFoundError)
