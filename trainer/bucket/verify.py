"""Whether a committed folder is whole: every file as its manifest says. Needs no torch."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from trainer.bucket.deadlines import within
from trainer.bucket.hashing import hash_file
from trainer.layout.documents import says_not_there
from trainer.layout.manifest import FileRecord, Manifest


def problem(folder: Path, manifest: Manifest, past_cache: bool = False) -> str | None:
    """What is not as the manifest says, as a sentence; None where the folder is whole. Reads and hashes every file.

    `past_cache` as of `hash_file`.
    """
    for name, record in manifest.files.items():
        try:
            found = file_problem(folder, name, record, past_cache=past_cache)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found is not None:
            return found
    return None


def file_problem(
    folder: Path,
    name: str,
    record: FileRecord,
    told: Callable[[int], None] = lambda count: None,
    past_cache: bool = False,
) -> str | None:
    """What is wrong with one file, as a sentence; None where it is as its manifest says. Reads and hashes it.

    Args:
        folder: The folder of the manifest; it may be a bucket's.
        name: The file's name in the manifest.
        record: What the manifest says of it.
        told: Hears how many bytes each piece had that was read.
        past_cache: As of `hash_file`.

    Raises:
        OSError: it cannot be read, which says nothing of whether it is whole.
    """
    path = folder / name
    try:
        with within(f"looking at {name}"):
            found = path.stat()
        if stat.S_IFMT(found.st_mode) not in (stat.S_IFREG, 0):  # 0: a bucket that does not say.
            return f"{name} is not a file"
        if found.st_size != record.bytes:
            return f"{name} has {found.st_size} bytes, its manifest says {record.bytes}"
        if hash_file(path, told, past_cache) != record.hash:
            return f"{name} does not hash to what its manifest says"
    except OSError as error:
        if not says_not_there(error):
            raise
        return f"{name} is missing"
    return None
