"""The stores of a campaign: a local disk, a store that accepts only sequential writes, and mounts of a bucket."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bucket_lab
import faultfs

NAMES = ("local", "sequential", "local-ranks", "sequential-ranks", "rclone", "rclone-cached")
MOST_RANKS = 3
"""Maximum number of an attempt's processes, on the stores named *-ranks."""


@dataclass
class Place:
    """A store with a mount of it."""

    name: str
    root: Path
    """The folder that the trainer uses."""
    behind: Path
    """The same folder behind the mount: what the store really holds."""
    faults: faultfs.Client | None = None
    mount: bucket_lab.Mounted | None = None
    ranks: int = 1
    """Maximum number of an attempt's processes."""

    @property
    def uploads_later(self) -> bool:
        """Whether a file may reach the store only some time after it was closed."""
        return self.name == "rclone-cached"

    def freeze(self) -> None:
        """Freeze the daemon: calls into the mount no longer return."""
        (self.mount or self._daemon()).freeze()

    def thaw(self) -> None:
        """Let the daemon continue, and with it the calls."""
        (self.mount or self._daemon()).thaw()

    def _daemon(self) -> bucket_lab.Mounted:
        assert self.faults
        return bucket_lab.Mounted(self.root, self.faults.daemon, Path())


def missing(name: str) -> str | None:
    """The reason why this machine cannot provide a store; None if it can."""
    if name.startswith("rclone"):
        return bucket_lab.missing()
    return faultfs.missing() if name.startswith("sequential") else None


@contextlib.contextmanager
def place(name: str, folder: Path, store: bucket_lab.Store | None) -> Iterator[Place]:
    """Mount a store."""
    ranks = MOST_RANKS if name.endswith("-ranks") else 1
    if name.startswith("local"):
        yield Place(name, folder, folder, ranks=ranks)
    elif name.startswith("sequential"):
        behind = folder / "behind"
        behind.mkdir(exist_ok=True)
        with faultfs.mounted(behind, folder / "m", name="goofys") as faults:
            yield Place(name, faults.point, behind, faults=faults, ranks=ranks)
    else:
        assert store
        options = ["--vfs-write-back", "0.1s", "--bwlimit", "400k"] if name == "rclone-cached" else []
        shutil.rmtree(folder / "m", ignore_errors=True)
        with bucket_lab.mounted(store, folder / "m", *options, cached=name == "rclone-cached") as mount:
            yield Place(name, mount.point, store.behind, mount=mount)
