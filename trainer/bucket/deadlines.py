"""What is under way in the bucket, and until when it has to be over. Standard library only.

A mount whose server is gone does not fail: a write() to it never returns, and cannot be interrupted. So whoever touches
the bucket says before how long that may take, and a thread of each rank looks whether something is overdue.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.layout import manifest
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.manifest import Manifest

SLOWEST_BYTES_PER_S = 10e6
LIMIT_S = 120.0
"""How long one call may take."""
LOOK_S = 0.5


@dataclass(frozen=True)
class UnderWay:
    """One call that has not returned."""

    what: str
    begun: float
    until: float
    code: int
    """With what the attempt ends once it is overdue."""
    where: Path | None = None
    """What it touches; None: the run's folder."""


_number = itertools.count()
_under_way: dict[int, UnderWay] = {}


@contextmanager
def within(
    what: str, seconds: float | None = None, code: int = EXIT_PREEMPTED, where: Path | None = None
) -> Iterator[None]:
    """Say that what happens inside has to be over within so many seconds (`LIMIT_S` where it is not said)."""
    key, now = next(_number), time.monotonic()
    _under_way[key] = UnderWay(what, now, now + (LIMIT_S if seconds is None else seconds), code, where)
    try:
        yield
    finally:
        del _under_way[key]


@contextmanager
def within_bytes(what: str, count: int) -> Iterator[None]:
    """The same for a call that moves `count` bytes: some mounts upload a whole file inside close()."""
    with within(what, LIMIT_S + count / SLOWEST_BYTES_PER_S):
        yield


@contextmanager
def opened(path: Path, what: str, where: Path | None = None) -> Iterator[BinaryIO]:
    """A file to be read without a buffer; opening and closing it has to be over in time: FUSE asks its daemon at both.

    Who reads from it says `within` for each call.
    """
    with within(f"opening {what}", where=where):
        file = path.open("rb", buffering=0)
    try:
        yield file  # type: ignore[misc]  # A FileIO: it reads as any binary file does.
    finally:
        with within(f"closing {what}", where=where):
            file.close()


def read_manifest(folder: Path) -> Manifest:
    """`manifest.read_manifest`, and it has to be over in time."""
    with within(f"reading MANIFEST.json of {folder.name}"):
        return manifest.read_manifest(folder)


def overdue() -> UnderWay | None:
    """A call that should have returned by now; None where there is none."""
    now = time.monotonic()
    return next((call for call in list(_under_way.values()) if now > call.until), None)


def await_overdue() -> UnderWay:
    """Wait until a call should have returned and has not; for a thread of its own."""
    while not (call := overdue()):
        time.sleep(LOOK_S)
    return call
