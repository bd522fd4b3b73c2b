"""xxh3-128, as a file is written and when it is read: 23 GB/s, so that hashing is never what a save waits for."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from trainer.bucket.deadlines import opened, within

CHUNK_BYTES = 8 << 20
BLOCK = 4096
"""What is read or written past the system's cache begins and ends at multiples of it, in memory and in the file."""
_MASK = (1 << 62) - 1


class Hasher:
    """A hash that grows with what is written."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take in more bytes."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()


def hash_bytes(data: bytes | memoryview) -> str:
    """The hash of bytes, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def fingerprint(*parts: bytes | memoryview | int | str) -> int:
    """62 bits of a hash of the parts."""
    data = [part if isinstance(part, (bytes, memoryview)) else str(part).encode() for part in parts]
    # A tensor's bytes may be large: they are not copied.
    return int(hash_bytes(data[0] if len(data) == 1 else b"/".join(data)), 16) & _MASK


def hash_file(path: Path, told: Callable[[int], None] = lambda count: None, past_cache: bool = False) -> str:
    """The hash of a file, read front to back.

    Args:
        path: The file; it may be a bucket's.
        told: Hears how many bytes each piece had.
        past_cache: Read what the disk has, not what the system remembers of it, where the file system can.
    """
    # One buffer for all pieces: fresh memory for each costs more than reading. It begins at a page.
    hasher, buffer, at = Hasher(), memoryview(mmap.mmap(-1, CHUNK_BYTES)), 0
    with opened(path, "a file") as file:
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
            told(count)
            at += count


def turn_past_cache(descriptor: int, past_cache: bool) -> bool:
    """Have an open file read and written past the system's cache from now on, or not; whether it is."""
    flags, direct = fcntl.fcntl(descriptor, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if past_cache else flags & ~direct)
    except OSError:
        return False
    return past_cache
