"""The mounts of a task, and paths on the machine as SkyPilot interprets them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

CHECKPOINT_DIR = "SKYSPOT_CHECKPOINT_DIR"
"""The variable that names the run's folder."""
TRAINER = "~/skyspot/trainer"
"""The folder for a template's copy of the trainer."""
WORKDIR = "~/sky_workdir"
"""The folder in which SkyPilot starts `run`."""
_HOME = re.compile(r"^(?:\$HOME|\$\{HOME\})(?=/|$)")


@dataclass(frozen=True)
class Mount:
    """One entry of file_mounts."""

    path: str
    """The path on the machine: absolute, or from `~/`."""
    source: str = ""
    """Empty if SkyPilot creates the bucket, or if there are several sources."""
    name: str = ""
    """The bucket's name; empty if there is none or the source names it."""
    mode: str = "MOUNT"
    """MOUNT, MOUNT_CACHED or COPY; other texts are kept as written."""
    store: str = ""
    """The store to create the bucket in; empty: SkyPilot chooses."""
    read_only: bool = False
    is_bucket: bool = True
    """True if the entry is a mapping that describes a bucket; else it is a path or URL to copy."""
    states_mode: bool = False
    """True if the entry sets `mode`; else it is SkyPilot's default."""
    sources: tuple[str, ...] = ()
    """The sources, if a bucket has several."""
    line: int = 1
    mode_line: int = 1

    @property
    def lasts(self) -> bool:
        """True if files written there go to a bucket."""
        return self.mode in ("MOUNT", "MOUNT_CACHED")


class _HasPath(Protocol):
    @property
    def path(self) -> str: ...


_MountT = TypeVar("_MountT", bound=_HasPath)


def innermost(mounts: Iterable[_MountT], path: str) -> _MountT | None:
    """Find the mount that contains a path; the deepest, if mounts are nested."""
    return max((one for one in mounts if within(path, one.path)), key=lambda one: len(one.path), default=None)


def clean_path(path: str, folder: str = WORKDIR) -> str:
    """Normalize a path on the node to absolute or from `~`; a relative one starts from `folder`."""
    path = _HOME.sub("~", path)
    if not path.startswith(("/", "~")):
        path = f"{folder}/{path}"
    return posixpath.normpath(path)


def within(path: str, folder: str) -> bool:
    """True if a path is the folder or inside it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
