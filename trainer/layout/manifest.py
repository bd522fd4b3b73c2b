"""Manifest: the last file written into a folder, which makes the folder committed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.layout.documents import (
    LAYOUT_VERSION,
    LayoutError,
    LayoutVersionError,
    check_seal,
    check_version,
    from_json,
    read_whole,
    says_not_there,
    sealed,
)
from trainer.layout.names import MANIFEST, is_safe_name

_HASH = re.compile(r"[0-9a-f]{32}")
_NO_FACTS = {"layout_version", "kind", "files", "seal"}


@dataclass(frozen=True)
class FileRecord:
    """A manifest's record of one file."""

    bytes: int
    """Size in bytes."""
    hash: str
    """xxh3-128 of the contents, 32 hexadecimal digits."""

    def size_problem(self, name: object, size: int) -> str | None:
        """A difference of a file's size from the record, as a sentence that names the file; else None."""
        return None if size == self.bytes else f"{name} has {size} bytes, its manifest says {self.bytes}"

    def hash_problem(self, name: object, digest: str) -> str | None:
        """A difference of the hash of a file's contents from the record, as a sentence that names the file."""
        return None if digest == self.hash else f"{name} does not match the hash in its manifest"


@dataclass(frozen=True)
class Manifest:
    """The last file written into a folder; it makes the folder committed."""

    kind: str
    """`checkpoint`, `tokens` or `final`."""
    files: Mapping[str, FileRecord]
    """Every other file of the folder, by its path relative to the folder, with `/`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts. For a checkpoint: run_id, step, samples (consumed so far), world_size, attempt, config, binding,
    machine, tokens (folder name), finite (False: its weights hold NaN or infinite values; missing in older releases),
    metrics (list of {path, bytes, hash, first_step, last_step})."""

    @property
    def step(self) -> int:
        """The step of the folder's contents; 0 if it has none."""
        return int(self.facts.get("step", 0))

    @property
    def finite(self) -> bool:
        """False if a checkpoint's weights are known to hold NaN or infinite values."""
        return self.facts.get("finite") is not False

    @property
    def total_bytes(self) -> int:
        """Size of all files together, in bytes."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> bytes:
        """The bytes of the manifest's file."""
        files = {name: {"bytes": record.bytes, "hash": record.hash} for name, record in sorted(self.files.items())}
        return sealed({"layout_version": LAYOUT_VERSION, "kind": self.kind, **self.facts, "files": files})

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest, trusting nothing in it.

        Raises:
            LayoutError: it is torn, or lists files outside its folder, or impossible sizes or hashes.
            LayoutVersionError: a newer release wrote it.
        """
        document = from_json(data)
        if not isinstance(document, dict):
            raise LayoutError("not a JSON object")
        check_seal(document)
        check_version(document)
        kind, listed = document.get("kind"), document.get("files")
        if not isinstance(kind, str) or not isinstance(listed, dict):
            raise LayoutError("it has no `kind` or no `files`")
        files = {}
        for name, record in listed.items():
            if not is_safe_name(name):
                raise LayoutError(f"it lists a file outside its folder: {name[:80]!r}")
            size = record.get("bytes") if isinstance(record, dict) else None
            digest = record.get("hash") if isinstance(record, dict) else None
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
                raise LayoutError(f"{name}: impossible size {size!r}")
            if not isinstance(digest, str) or not _HASH.fullmatch(digest):
                raise LayoutError(f"{name}: its hash is malformed")
            files[name] = FileRecord(size, digest)
        facts = {key: value for key, value in document.items() if key not in _NO_FACTS}
        step = facts.get("step", 0)
        if type(step) is not int or step < 0:
            raise LayoutError(f"step is {str(step)[:80]!r}, not a whole number from 0")
        return cls(kind, files, facts)


def read_manifest(folder: Path, read: Callable[[Path], bytes] = read_whole) -> Manifest:
    """The manifest of a folder; `read` returns a file's contents, or raises what `read_whole` raises.

    Raises:
        LayoutError: the manifest is missing (so the folder is not committed), malformed or torn.
        LayoutVersionError: a newer release wrote it.
    """
    path = folder / MANIFEST
    try:
        return Manifest.parse(read(path))
    except FileNotFoundError:
        raise LayoutError("not committed: it has no MANIFEST.json") from None
    except LayoutVersionError as error:
        raise LayoutVersionError(f"{path}: {error}") from None
    except LayoutError as error:
        raise LayoutError(f"not committed: MANIFEST.json: {error}") from None


def sizes_agree(folder: Path, manifest: Manifest, size_of: Callable[[str], int] | None = None) -> str | None:
    """The first listed file that is missing or has another size, as a sentence; None if all sizes agree.

    This check is cheap, and blind to flipped bits: a restore checks hashes too. `size_of` returns the size of a listed
    file in bytes, or raises OSError; it is for callers that know the sizes from a listing.

    Raises:
        OSError: a file's size cannot be read; the file may still be whole.
    """
    for name, record in manifest.files.items():
        try:
            size = size_of(name) if size_of else (folder / name).stat().st_size
        except OSError as error:
            if not says_not_there(error):
                raise
            return f"{name}: {error.strerror or error}"
        if found := record.size_problem(name, size):
            return found
    return None
