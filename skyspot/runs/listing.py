"""File sizes below a folder of a run, and small files whose size is known; of a bucket in one request each."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.layout.documents import MAX_JSON_BYTES, LayoutError


def sizes_below(folder: Path) -> dict[str, int]:
    """The size in bytes of every file below a folder, by its path relative to the folder, with `/`.

    A missing folder has no files. A bucket is listed once, however many files it has.

    Raises:
        OSError: the folder cannot be listed.
    """
    found: dict[str, int] = {}
    if isinstance(folder, Path):
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):  # Pruned in the meantime, or a broken link.
                    path = Path(parent, name)
                    found[path.relative_to(folder).as_posix()] = path.stat().st_size
        return found
    bucket: Any = folder
    prefix = f"{bucket.path.rstrip('/')}/"
    try:
        listed = bucket.fs.find(bucket.path, detail=True)
    except FileNotFoundError:
        return found
    for name, info in listed.items():
        if name.startswith(prefix):
            size = info.get("size")
            found[name[len(prefix) :]] = size if isinstance(size, int) else int(bucket.fs.size(name))
    return found


def read_listed(path: Path, size: int) -> bytes:
    """The content of a small file whose size a listing gave.

    Raises:
        LayoutError: the file is too large.
        OSError: the file cannot be read.
    """
    if size > MAX_JSON_BYTES:
        raise LayoutError(f"too large ({size} bytes)")
    if isinstance(path, Path):
        return path.read_bytes()
    bucket: Any = path
    return bytes(bucket.fs.cat_file(bucket.path, start=0, end=size)) if size else b""
