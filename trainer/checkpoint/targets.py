"""Targets: memory that a file's bytes are read into, and hashed on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.bucket.deadlines import opened, within
from trainer.bucket.hashing import CHUNK_BYTES, Hasher
from trainer.checkpoint.damage import DamagedError
from trainer.layout.manifest import FileRecord

_VIEWS = 256
"""The most pieces of memory that one call fills."""


@dataclass(frozen=True)
class Target:
    """A range of a file's bytes, and the memory that they go into."""

    start: int
    end: int
    memory: memoryview


def read_all(path: Path, name: str, record: FileRecord, header: bytes, targets: Sequence[Target]) -> None:
    """Read a file front to back, hash it, and keep the targets' bytes.

    Raises:
        DamagedError: it differs from the manifest.
        OSError: it cannot be read.
    """
    scratch = memoryview(bytearray(min(CHUNK_BYTES, record.bytes)))
    opening = memoryview(bytearray(len(header)))
    pieces = _pieces([Target(0, len(header), opening), *targets], record.bytes, scratch)
    hasher, done = Hasher(), 0
    with opened(path, name) as file:
        views: list[memoryview] = []
        for piece in pieces:
            if piece.obj is scratch.obj and any(view.obj is scratch.obj for view in views):
                done += _fill(file, name, views, done, record.bytes, hasher)
                views = []
            views.append(piece)
            if len(views) == _VIEWS or sum(map(len, views)) >= CHUNK_BYTES:
                done += _fill(file, name, views, done, record.bytes, hasher)
                views = []
        done += _fill(file, name, views, done, record.bytes, hasher)
    if bytes(opening) != header:
        raise DamagedError(f"the header of {name} changed while it was read")
    if found := record.hash_problem(name, hasher.hexdigest()):
        raise DamagedError(found)


def _pieces(targets: Sequence[Target], size: int, scratch: memoryview) -> Iterator[memoryview]:
    """Memory for the bytes of a file, front to back, at most CHUNK_BYTES at a time; `scratch` for unwanted bytes.

    Raises:
        DamagedError: two targets overlap in the file.
    """
    at = 0
    for target in [*targets, Target(size, size, scratch[:0])]:
        if target.start < at:
            raise DamagedError("two tensors overlap in the file")
        for length in _cut(target.start - at):
            yield scratch[:length]
        for start in range(0, target.end - target.start, CHUNK_BYTES):
            yield target.memory[start : start + CHUNK_BYTES]
        at = target.end


def _cut(length: int) -> Iterator[int]:
    while length > 0:
        yield min(length, CHUNK_BYTES)
        length -= CHUNK_BYTES


def read_some(path: Path, name: str, targets: Sequence[Target]) -> None:
    """Read the targets' bytes from a file that another rank hashes."""
    with opened(path, name) as file:
        for target in targets:
            file.seek(target.start)
            done = 0
            for start in range(0, len(target.memory), CHUNK_BYTES):
                views = [target.memory[start : start + CHUNK_BYTES]]
                done += _fill(file, name, views, target.start + done, target.end)


def _fill(
    file: BinaryIO, name: str, views: Sequence[memoryview], done: int, size: int, hasher: Hasher | None = None
) -> int:
    """Fill pieces of memory from a file, one after the other; returns the number of bytes."""
    left = [view for view in views if len(view)]
    total = sum(map(len, left))
    while left:
        with within(f"reading {name}"):
            count = os.readv(file.fileno(), left)
        if not count:
            raise DamagedError(f"{name} ends after {done + total - sum(map(len, left))} of {size} bytes")
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    for view in views:
        if hasher:
            hasher.update(view)
    return total
