"""The files of the layout: JSON, sealed with a hash of itself, written once, and checked when read."""

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
    """Something in a run's folder is not what the layout says: torn, tampered with, or written by a newer release."""


class LayoutVersionError(LayoutError):
    """A file was written by a release whose layout is newer than this one's."""


def to_json(value: Any) -> bytes:
    """JSON as this layout writes it: ASCII, NaN refused (write None)."""
    return json.dumps(value, indent=1, allow_nan=False).encode("ascii")


def sealed(document: Mapping[str, Any]) -> bytes:
    """A JSON object that carries a hash of itself: a manifest is hashed by no other file."""
    document = {key: document[key] for key in document if key != "seal"}
    return to_json({**document, "seal": _seal(json.loads(to_json(document)))})


def check_seal(document: Mapping[str, Any]) -> None:
    """See that an object that carries a hash of itself is as it was written.

    Raises:
        LayoutError: it is not.
    """
    rest = {key: document[key] for key in document if key != "seal"}
    try:
        broken = len(rest) < len(document) and document["seal"] != _seal(rest)
    except (RecursionError, ValueError) as error:
        raise LayoutError(f"not what this layout writes ({error})") from None
    if broken:
        raise LayoutError("it does not hash to what it says itself")


def _seal(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def from_json(data: bytes) -> Any:
    """JSON as this layout reads it.

    Raises:
        LayoutError: not JSON, NaN or infinity in it, a key twice, or nested too deeply.
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise LayoutError("a key stands in it twice")
        return found

    def no_constant(name: str) -> Any:
        raise LayoutError(f"{name} stands in it")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_twins, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"not readable as JSON ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        LayoutError: the file is not one, or is too large to be one.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise LayoutError(f"{path.name}: too large")
    document = from_json(path.read_bytes())
    if not isinstance(document, dict):
        raise LayoutError(f"{path.name}: not a JSON object")
    return document


def write_once(path: Path, data: bytes) -> None:
    """Write a new file front to back. Never over an old one: no mount that SkyPilot uses does that safely.

    Raises:
        FileExistsError: the file is there already.
        OSError: the write, the fsync or the close failed; the file may be there in part.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        fsync(file.fileno())


def fsync(descriptor: int) -> None:
    """Fsync where the file system has it; some FUSE mounts and pipes answer EINVAL or ENOTSUP."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def check_version(document: Mapping[str, Any]) -> None:
    """Refuse what a newer release wrote.

    Raises:
        LayoutVersionError: the layout is newer.
        LayoutError: there is no version.
    """
    version = document.get("layout_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise LayoutError("it has no layout version")
    if version > LAYOUT_VERSION:
        raise LayoutVersionError(
            f"written with layout version {version}; this release reads up to {LAYOUT_VERSION}. Upgrade skyspot."
        )


def read_whole(path: Path) -> bytes:
    """What is in a small file.

    Raises:
        LayoutError: it is too large to be one.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise LayoutError("too large to be one")
    return path.read_bytes()


def says_not_there(error: OSError) -> bool:
    """Whether an error tells that a file is not as it was written; any other says nothing of the file."""
    # A bucket's errors have no number.
    return error.errno in _NOT_THERE or isinstance(error, FileNotFoundError)
