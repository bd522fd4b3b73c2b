"""Where the runs of a campaign lie: a local disk, a store that takes sequential writes only, and a bucket's mounts."""

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
"""Of an attempt, on the stores that are for several."""


@dataclass
class Place:
    """A store with a mount of it."""

    name: str
    root: Path
    """Where the trainer sees it."""
    behind: Path
    """The store itself."""
    faults: faultfs.Client | None = None
    mount: bucket_lab.Mounted | None = None
    ranks: int = 1
    """How many an attempt has at most."""

    @property
    def uploads_later(self) -> bool:
        """Whether a file that was closed may not be in the store yet."""
        return self.name == "rclone-cached"

    def freeze(self) -> None:
        """Calls into the mount do not return any more."""
        (self.mount or self._daemon()).freeze()

    def thaw(self) -> None:
        """They go on."""
        (self.mount or self._daemon()).thaw()

    def _daemon(self) -> bucket_lab.Mounted:
        assert self.faults
        return bucket_lab.Mounted(self.root, self.faults.daemon, Path())


def missing(name: str) -> str | None:
    """Why there is no such store on this machine; None where there is."""
    if name.startswith("rclone"):
        return bucket_lab.missing()
    return faultfs.missing() if name.startswith("sequential") else None


@contextlib.contextmanager
def place(name: str, folder: Path, store: bucket_lab.Store | None) -> Iterator[Place]:
    """A store, mounted anew."""
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
