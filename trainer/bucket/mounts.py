"""Mounts: what a folder lies on, and what proves that a file written there is in the store. Standard library only.

On a mount that writes through, a file is in the store if it was closed and reads back. A caching mount shows files that
it has yet to upload, so only its log proves an upload (SkyPilot has rclone write one for MOUNT_CACHED). This module
tells mounts apart by their daemon's command line, because the kernel knows most of them as `fuse` only. A mount counts
as writing through only if that is certain: a wrong belief in a read-back would delete the last whole checkpoint.

Nothing here waits for a mount: it reads /proc and the log, and touches no path for which a daemon has to answer.
"""

from __future__ import annotations

import enum
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "overlay")
"""File systems of local disks, which are better written past the system's cache."""
WRITE_THROUGH = ("goofys", "gcsfuse", "blobfuse2", "mount-s3")
"""Daemons that have uploaded a file before its close() returns."""
WRITE_THROUGH_MODES = ("off", "minimal")
"""Values of rclone's --vfs-cache-mode. `minimal` caches only files opened for reading and writing; we open none so."""
CACHING_MODES = ("writes", "full")
WRAPPER = "fusermount-wrapper"
"""SkyPilot's wrapper on Kubernetes: its arguments are the mount point, `--`, and the daemon's command without it."""

_LONGEST_LINK_CHAIN = 40
_UPLOADED = re.compile(rb"^(?:\S+ )*?INFO +: (.*): vfs cache: (upload succeeded|queuing for upload)")
_ESCAPE = re.compile(r"\\([0-7]{3})")


class Proof(enum.Enum):
    """The proof that a file is in the store."""

    READ_BACK = "reading it back"
    UPLOAD_LOG = "the mount's log"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Mount:
    """The mount that a folder lies on."""

    point: Path
    kind: str
    """The file system's type, or the name of the mount's daemon."""
    proof: Proof
    log: Path | None = None
    """The log to read for UPLOAD_LOG."""

    def inside(self, path: Path) -> PurePath:
        """A path as the mount's log names it: relative to the mount point, with links on the way there resolved.

        Raises:
            ValueError: the path is not on this mount.
        """
        return _real(path, _mounted()).relative_to(self.point)


def mount_of(path: Path) -> Mount:
    """The mount that holds a path; the path need not exist yet."""
    mounted = _mounted()
    if not mounted:
        return Mount(Path("/"), "a folder", Proof.READ_BACK)
    here = _walk(_real(path, mounted), mounted)[-1]
    if not here.is_fuse:
        return Mount(here.point, here.kind, Proof.READ_BACK if here.kind else Proof.NOTHING)
    subtype = here.kind.partition(".")[2]
    found = {
        mount
        for daemon in _daemons(here.point)
        if subtype in ("", daemon.name) and (mount := _judge(here.point, daemon))
    }
    # Two different daemons claim the mount point: one is from another time or another mount namespace.
    return found.pop() if len(found) == 1 else Mount(here.point, here.kind, Proof.NOTHING)


@dataclass(frozen=True)
class _Mounted:
    """A line of /proc/self/mountinfo."""

    number: str
    parent: str
    """Empty for the first mount."""
    point: Path
    kind: str

    @property
    def is_fuse(self) -> bool:
        return self.kind == "fuse" or self.kind.startswith("fuse.")  # `fuseblk` lies on a disk.


def _mounted() -> dict[Path, list[_Mounted]]:
    """All mounts by mount point; empty without /proc."""
    lines = []
    with suppress(OSError):
        lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    numbers = {line.split(" ", 1)[0] for line in lines}
    found: dict[Path, list[_Mounted]] = {}
    for line in lines:
        left, _, right = line.partition(" - ")
        number, parent, _, _, point = left.split(" ")[:5]
        place = Path(_ESCAPE.sub(lambda code: chr(int(code[1], 8)), point))
        mount = _Mounted(number, parent if parent in numbers - {number} else "", place, right.split(" ")[0])
        found.setdefault(place, []).append(mount)
    return found


def _walk(path: Path, mounted: dict[Path, list[_Mounted]]) -> list[_Mounted]:
    """The mounts that a path without links leads through, from the root on; the last one holds the path.

    This is how the kernel walks: of several mounts at one point the last counts, and a mount on a folder hides the
    mounts that were below that folder.
    """
    way = [_Mounted("", "", Path("/"), "")]
    for place in (*reversed(path.parents), path):
        here = list(mounted.get(place, ()))
        while on_top := [mount for mount in here if mount.parent == way[-1].number]:
            way.append(on_top[-1])
            here.remove(on_top[-1])
    return way


def _real(path: Path, mounted: dict[Path, list[_Mounted]]) -> Path:
    """The path with links resolved as by `Path.resolve`, except on FUSE, where nothing is looked up."""
    whole = path if path.is_absolute() else Path.cwd() / path
    left, real, links = list(reversed(whole.parts[1:])), Path("/"), 0
    while left:
        part = left.pop()
        if part == "..":
            real = real.parent
            continue
        real = real / part
        if links < _LONGEST_LINK_CHAIN and not any(mount.is_fuse for mount in _walk(real, mounted)):
            with suppress(OSError):
                target = real.readlink()
                links += 1
                real = Path("/") if target.is_absolute() else real.parent
                left += [part for part in reversed(target.parts) if part != "/"]
    return real


@dataclass(frozen=True)
class _Daemon:
    """A process that may serve a mount."""

    name: str
    arguments: list[str]
    cwd: Path
    env: dict[str, str] | None
    """None if it may not be read."""

    def option(self, name: str, default: str) -> str | None:
        """The value of rclone's --NAME or RCLONE_NAME; None if it is unknown."""
        value = None if self.env is None else self.env.get(_variable(name), default)
        for index, argument in enumerate(self.arguments):
            if argument == f"--{name}" and index + 1 < len(self.arguments):
                value = self.arguments[index + 1]
            elif argument.startswith(f"--{name}="):
                value = argument.partition("=")[2]
        return value

    def mentions(self, *names: str) -> bool:
        """True if one of rclone's --NAMEs or RCLONE_NAMEs is given, with any value."""
        given = {argument.partition("=")[0] for argument in self.arguments}
        return any(f"--{name}" in given or _variable(name) in (self.env or {}) for name in names)


def _variable(option: str) -> str:
    return f"RCLONE_{option.upper().replace('-', '_')}"


def _daemons(point: Path) -> list[_Daemon]:
    """The processes with a daemon's name that have the mount point among their arguments."""
    mounted, found = _mounted(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # Read the name first: a command line cannot be read while its process waits for a page from a mount.
            name = (process / "comm").read_text(errors="replace").strip()
            if name not in (*WRITE_THROUGH, "rclone", WRAPPER[:15]):
                continue
            arguments = os.fsdecode((process / "cmdline").read_bytes()).split("\0")[1:-1]
            cwd, env = Path("/"), None
            with suppress(OSError):
                cwd = (process / "cwd").readlink()
            if point not in (_real(cwd / argument, mounted) for argument in arguments):
                continue
            if name == WRAPPER[:15]:
                if "--" not in arguments[:-1]:
                    continue
                command, *arguments = arguments[arguments.index("--") + 1 :]
                name = Path(command).name
            with suppress(OSError):
                pairs = os.fsdecode((process / "environ").read_bytes()).split("\0")
                env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            found.append(_Daemon(name, arguments, cwd, env))
    return found


def _judge(point: Path, daemon: _Daemon) -> Mount | None:
    """The mount that a daemon serves; None if it serves none."""
    if daemon.name == "rclone":
        # Other commands name a mount point too: `rclone copy MOUNT_POINT ...`.
        return _judge_rclone(point, daemon) if {"mount", "mount2", "cmount"} & {*daemon.arguments} else None
    if daemon.name not in WRITE_THROUGH:
        return None
    delays = {
        "goofys": ("--cache",),  # Puts another file system (catfs) in between.
        "blobfuse2": ("--lazy-write", "--config-file", "--secure-config"),  # A file may set lazy-write too.
    }.get(daemon.name, ())
    is_delayed = any(argument.partition("=")[0] in delays for argument in daemon.arguments)
    return Mount(point, daemon.name, Proof.NOTHING if is_delayed else Proof.READ_BACK)


def _judge_rclone(point: Path, daemon: _Daemon) -> Mount:
    """The mount that rclone serves: without a write cache it writes through; with one, a log of level INFO is proof."""
    mode = (daemon.option("vfs-cache-mode", "off") or "").lower()
    if mode in WRITE_THROUGH_MODES:
        return Mount(point, "rclone", Proof.READ_BACK)
    log, kind = daemon.option("log-file", ""), "rclone with a cache"
    is_verbose = (daemon.option("log-level", "") or "").upper() in ("INFO", "DEBUG") or daemon.mentions("verbose")
    is_verbose = is_verbose or any(re.fullmatch("-v+", argument) for argument in daemon.arguments)
    is_ours = not daemon.mentions("use-json-log", "log-systemd", "syslog")
    if mode in CACHING_MODES and log and is_verbose and is_ours and os.access(daemon.cwd / log, os.R_OK):
        return Mount(point, kind, Proof.UPLOAD_LOG, daemon.cwd / log)
    return Mount(point, kind, Proof.NOTHING)


class UploadLog:
    """The files that rclone logged as uploaded. A file's last entry counts; each part of the log is read once."""

    def __init__(self, log: Path) -> None:
        """Start at the beginning of the log."""
        self._log = log
        self._file: BinaryIO | None = None
        self._rest = b""
        self._uploaded: set[str] = set()
        self._at_work = threading.Lock()

    def __del__(self) -> None:
        if self._file:
            self._file.close()

    def has(self, path: PurePath | str) -> bool:
        """True if a file is in the store, given its path below the mount point (`Mount.inside`).

        Raises:
            OSError: the log cannot be read.
        """
        with self._at_work:
            self._read_on()
            return PurePath(path).as_posix() in self._uploaded

    def _read_on(self) -> None:
        """Read what was added, even if the log was moved away or emptied and started again."""
        now = self._log.stat()
        if self._file:
            then = os.fstat(self._file.fileno())
            is_another = (then.st_dev, then.st_ino) != (now.st_dev, now.st_ino)
            if is_another:
                self._take_in(self._file)
            if is_another or now.st_size < self._file.tell():
                self._file.close()
                self._file = None
        if self._file is None:
            self._file, self._rest = self._log.open("rb"), b""
        self._take_in(self._file)

    def _take_in(self, file: BinaryIO) -> None:
        while data := file.read(1 << 20):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if found := _UPLOADED.match(line):
                    name = os.fsdecode(found[1])
                    (self._uploaded.add if found[2] == b"upload succeeded" else self._uploaded.discard)(name)
