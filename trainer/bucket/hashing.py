"""Hashes (xxh3-128) of files, while they are written or read: at 23 GB/s, no save ever waits for hashing."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import xxhash

from trainer.bucket.deadlines import opened, within

CHUNK_BYTES = 8 << 20
BLOCK = 4096
"""A read or write past the system's cache begins and ends at multiples of it, in memory and in the file."""
MASK = (1 << 62) - 1
"""The bits of a fingerprint, and of a sum of fingerprints: both fit into a signed integer of 64 bits."""


class Hasher:
    """A hash of bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()


def hash_bytes(data: bytes | memoryview) -> str:
    """The hash of bytes, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def fingerprint(*parts: bytes | memoryview | int | str) -> int:
    """A hash of the parts, cut to 62 bits."""
    data = [part if isinstance(part, (bytes, memoryview)) else str(part).encode() for part in parts]
    # A tensor's bytes may be large: avoid copying them.
    return int(hash_bytes(data[0] if len(data) == 1 else b"/".join(data)), 16) & MASK


def hash_file(path: Path, on_read: Callable[[int], None] = lambda count: None, past_cache: bool = False) -> str:
    """The hash of a file, read front to back.

    Args:
        path: The file; it may be in a bucket.
        on_read: Called with the size of each piece, in bytes.
        past_cache: Read from the disk, not from the system's cache, if the file system can.
    """
    hasher, at = Hasher(), 0
    with opened(path, "a file") as file:
        # One buffer for all pieces, because fresh memory for each costs more than reading. It begins at a page.
        buffer = memoryview(mmap.mmap(-1, _past_cache_bytes(file) if past_cache else CHUNK_BYTES))
        past_cache = past_cache and turn_past_cache(file.fileno(), True)
        while True:
            if past_cache and at % BLOCK:
                past_cache = turn_past_cache(file.fileno(), False)
            try:
                with within("a read"):
                    count = int(file.readinto(buffer) or 0)
            except OSError as error:
                if not past_cache or error.errno != errno.EINVAL:
                    raise
                past_cache = turn_past_cache(file.fileno(), False)
                continue
            if not count:
                return hasher.hexdigest()
            hasher.update(buffer[:count])
            on_read(count)
            at += count


def _past_cache_bytes(file: FileIO) -> int:
    """The size of a buffer for a local file: Linux fills what a read asks for beyond the file's end with zeros."""
    with within("a read"):
        return min(CHUNK_BYTES, (os.fstat(file.fileno()).st_size // BLOCK + 1) * BLOCK)


def turn_past_cache(descriptor: int, past_cache: bool) -> bool:
    """Switch an open file's reads and writes past the system's cache on or off; return whether they are past it now."""
    flags, direct = fcntl.fcntl(descriptor, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if past_cache else flags & ~direct)
    except OSError:
        return False
    return past_cache
