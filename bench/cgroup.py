"""Limits the memory of a process, as a container does: with a control group of version 2 or 1."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_FILES = {1: ("memory.usage_in_bytes", "memory.limit_in_bytes"), 2: ("memory.current", "memory.max")}
"""By version: the files that hold the memory in use, and its limit."""


@dataclass(frozen=True)
class Group:
    """A control group that this process made."""

    folder: Path
    version: int

    def enter(self) -> None:
        """Put this process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, spare_bytes: int) -> None:
        """Limit memory to `spare_bytes` more than is in use now."""
        used, limit = _FILES[self.version]
        (self.folder / limit).write_text(str(int((self.folder / used).read_text()) + spare_bytes))

    def remove(self) -> None:
        """Delete it, as soon as its processes are gone."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)


def make(name: str) -> Group | None:
    """Make a group that can limit memory; None if this process cannot."""
    for parent, version in _parents():
        folder = parent / f"{name}-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            if (folder / _FILES[version][1]).exists():
                return Group(folder, version)
            folder.rmdir()
    return None


def _parents() -> Iterator[tuple[Path, int]]:
    """Yield this process's group and its ancestors: in version 2, a group with processes cannot have child groups."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                top, version = (ROOT / "memory", 1) if controllers else (ROOT, 2)
                own = top / path.lstrip("/")
                yield from ((parent, version) for parent in [own, *own.parents] if parent.is_relative_to(top))
