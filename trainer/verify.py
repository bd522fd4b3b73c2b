"""Whether a committed folder is whole: every file as its manifest says. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from trainer.hashing import hash_file
from trainer.layout import Manifest


def problem(folder: Path, manifest: Manifest) -> str | None:
    """What is not as the manifest says, as a sentence; None where the folder is whole. Reads and hashes every file."""
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
            if size != record.bytes:
                return f"{name} has {size} bytes, its manifest says {record.bytes}"
            if hash_file(folder / name) != record.hash:
                return f"{name} does not hash to what its manifest says"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None
