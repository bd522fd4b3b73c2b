"""Verification that a committed folder is whole: every file is as the manifest says. Needs no torch."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from trainer.bucket.deadlines import within
from trainer.bucket.hashing import hash_file
from trainer.layout.documents import says_not_there
from trainer.layout.manifest import FileRecord, Manifest


def problem(folder: Path, manifest: Manifest, past_cache: bool = False) -> str | None:
    """The first difference from the manifest, as a sentence; None if the folder is whole. Reads and hashes every file.

    For `past_cache`, see `hash_file`.
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
    on_read: Callable[[int], None] = lambda count: None,
    past_cache: bool = False,
) -> str | None:
    """The difference of one file from the manifest, as a sentence; None if it has none. Reads and hashes the file.

    Args:
        folder: The folder of the manifest; it may be in a bucket.
        name: The file's name in the manifest.
        record: The manifest's record of the file.
        on_read: Called with the size of each piece that was read, in bytes.
        past_cache: See `hash_file`.

    Raises:
        OSError: the file cannot be read; it may still be whole.
    """
    path = folder / name
    try:
        with within(f"looking at {name}"):
            found = path.stat()
        if stat.S_IFMT(found.st_mode) not in (stat.S_IFREG, 0):  # 0: the bucket does not tell the type.
            return f"{name} is not a file"
        return record.size_problem(name, found.st_size) or record.hash_problem(
            name, hash_file(path, on_read, past_cache)
        )
    except OSError as error:
        if not says_not_there(error):
            raise
        return f"{name} is missing"
