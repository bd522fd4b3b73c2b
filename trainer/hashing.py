"""xxh3-128, as a file is written and when it is read: 23 GB/s, so that hashing is never what a save waits for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from trainer.patience import within

CHUNK_BYTES = 8 << 20
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


def hash_bytes(data: bytes) -> str:
    """The hash of bytes, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def fingerprint(*parts: bytes | int | str) -> int:
    """62 bits of a hash of the parts."""
    data = b"/".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    return int(hash_bytes(data), 16) & _MASK


def hash_file(path: Path, told: Callable[[int], None] = lambda count: None) -> str:
    """The hash of a file, read front to back; `told` hears how many bytes each piece had."""
    # One buffer for all pieces: fresh memory for each costs more than reading.
    hasher, buffer = Hasher(), bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := _read_into(file, buffer):
            hasher.update(memoryview(buffer)[:count])
            told(count)
    return hasher.hexdigest()


def _read_into(file: Any, buffer: bytearray) -> int:
    with within("a read"):
        return int(file.readinto(buffer) or 0)
