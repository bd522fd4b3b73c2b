"""Deadlines for calls into the bucket. Standard library only.

A mount whose server is gone does not fail: a write() to it never returns, and cannot be interrupted. So every call into
the bucket states first how long it may take, and a thread of each rank looks for calls that are overdue.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from trainer.layout import manifest
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.manifest import Manifest

SLOWEST_BYTES_PER_S = 10e6
LIMIT_S = 120.0
"""The time that one call may take by default."""
LOOK_S = 0.5


@dataclass(frozen=True)
class UnderWay:
    """One call that has not returned."""

    what: str
    begun: float
    until: float
    code: int
    """The exit code of the attempt if the call is overdue."""
    where: Path | None = None
    """The path that the call touches; None: the run's folder."""


_number = itertools.count()
_under_way: dict[int, UnderWay] = {}


@contextmanager
def within(
    what: str, seconds: float | None = None, code: int = EXIT_PREEMPTED, where: Path | None = None
) -> Iterator[None]:
    """Give the block a deadline in seconds (`LIMIT_S` by default); past it, the attempt ends with `code`."""
    key, now = next(_number), time.monotonic()
    _under_way[key] = UnderWay(what, now, now + (LIMIT_S if seconds is None else seconds), code, where)
    try:
        yield
    finally:
        del _under_way[key]


@contextmanager
def within_bytes(what: str, count: int) -> Iterator[None]:
    """Give a call that moves `count` bytes a deadline: some mounts upload a whole file inside close()."""
    with within(what, LIMIT_S + count / SLOWEST_BYTES_PER_S):
        yield


@contextmanager
def opened(path: Path, what: str, where: Path | None = None) -> Iterator[FileIO]:
    """Open a file for unbuffered reading, with deadlines for open and close: FUSE asks its daemon at both.

    The caller puts each read into a `within` block.
    """
    with within(f"opening {what}", where=where):
        file = path.open("rb", buffering=0)
    try:
        yield file
    finally:
        with within(f"closing {what}", where=where):
            file.close()


def read_manifest(folder: Path) -> Manifest:
    """`manifest.read_manifest` with a deadline."""
    with within(f"reading MANIFEST.json of {folder.name}"):
        return manifest.read_manifest(folder)


def overdue() -> UnderWay | None:
    """A call past its deadline; None if there is none."""
    now = time.monotonic()
    return next((call for call in list(_under_way.values()) if now > call.until), None)


def await_overdue(over: threading.Event | None = None) -> UnderWay | None:
    """Wait until a call is past its deadline, in a thread of its own; returns None once `over` is set."""
    over = over or threading.Event()
    while not (call := overdue()):
        if over.wait(LOOK_S):
            return None
    return call
