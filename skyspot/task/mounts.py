"""What a task puts on its machine, and paths there as SkyPilot means them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

CHECKPOINT_DIR = "SKYSPOT_CHECKPOINT_DIR"
"""The variable that names the run's folder."""
TRAINER = "~/skyspot/trainer"
"""Where a template puts the copy of the trainer."""
WORKDIR = "~/sky_workdir"
"""Where SkyPilot starts `run`."""
_HOME = re.compile(r"^(?:\$HOME|\$\{HOME\})(?=/|$)")


@dataclass(frozen=True)
class Mount:
    """One entry of file_mounts."""

    path: str
    """On the machine: absolute, or from `~/`."""
    source: str = ""
    """Empty where SkyPilot is to make the bucket of that name, or where several files are named."""
    name: str = ""
    """The bucket's name; empty where it has none, or the source has it."""
    mode: str = "MOUNT"
    """MOUNT, MOUNT_CACHED, COPY, or whatever stands there."""
    store: str = ""
    """The store that the bucket is made in; empty: SkyPilot chooses."""
    read_only: bool = False
    is_bucket: bool = True
    """Whether it is described as a bucket, by a mapping; else a path or URL alone, which is copied."""
    states_mode: bool = False
    """Whether `mode` stands there; else it is SkyPilot's default."""
    sources: tuple[str, ...] = ()
    """Several sources of one bucket."""
    line: int = 1
    mode_line: int = 1

    @property
    def lasts(self) -> bool:
        """Whether what a program writes there goes into a bucket."""
        return self.mode in ("MOUNT", "MOUNT_CACHED")


class _HasPath(Protocol):
    @property
    def path(self) -> str: ...


_MountT = TypeVar("_MountT", bound=_HasPath)


def innermost(mounts: Iterable[_MountT], path: str) -> _MountT | None:
    """The mount that a path lies in; the deepest, where one lies in another."""
    return max((one for one in mounts if within(path, one.path)), key=lambda one: len(one.path), default=None)


def clean_path(path: str, folder: str = WORKDIR) -> str:
    """A path on the node, absolute or from `~`; a relative one starts from `folder`."""
    path = _HOME.sub("~", path)
    if not path.startswith(("/", "~")):
        path = f"{folder}/{path}"
    return posixpath.normpath(path)


def within(path: str, folder: str) -> bool:
    """Whether a path is the folder, or lies in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
