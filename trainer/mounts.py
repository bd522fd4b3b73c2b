"""What a folder lies on, and what shows that a file written there is in the store itself. Standard library only.

On what writes through, a file that was closed, and reads back, is there. A caching mount shows files that it has yet to
upload: there only its log tells (SkyPilot has rclone write one for MOUNT_CACHED). Mounts are told apart by their
daemon's command line, because all that the kernel knows of most is `fuse`.
"""

from __future__ import annotations

import enum
import os
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

WRITE_THROUGH = ("goofys", "gcsfuse", "blobfuse2", "mount-s3")
"""Daemons that have uploaded a file when its close() returns, or its fsync()."""
_UPLOADED = re.compile(rb"^\S+ \S+ +INFO +: (.*): vfs cache: (upload succeeded|queuing for upload)")
_ESCAPE = re.compile(r"\\([0-7]{3})")


class Proof(enum.Enum):
    """What shows that a file is in the store."""

    READ_BACK = "reading it back"
    UPLOAD_LOG = "the mount's log"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Mount:
    """What a folder lies on."""

    point: Path
    kind: str
    """The file system's type, or the name of the mount's daemon."""
    proof: Proof
    log: Path | None = None
    """Where UPLOAD_LOG is read."""


def mount_of(path: Path) -> Mount:
    """The mount that holds a path, which need not exist yet."""
    resolved = path.resolve()
    point, kind = Path("/"), ""
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            place = Path(_ESCAPE.sub(lambda found: chr(int(found[1], 8)), left.split(" ")[4]))
            if resolved.is_relative_to(place) and len(place.parts) >= len(point.parts):
                point, kind = place, right.split(" ")[0]
    if not kind.startswith("fuse"):
        return Mount(point, kind or "a local folder", Proof.READ_BACK)
    for arguments, cwd, env in _daemons(point):
        name = Path(arguments[0]).name
        if name in WRITE_THROUGH:
            return Mount(point, name, Proof.READ_BACK)
        if name.startswith("rclone"):
            return _rclone(point, arguments, cwd, env)
    return Mount(point, kind, Proof.NOTHING)


def _daemons(point: Path) -> list[tuple[list[str], Path, dict[str, str]]]:
    """(arguments, working folder, environment) of the processes that name a mount point in their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            cwd, env = Path("/"), {}
            with suppress(OSError):
                cwd = (process / "cwd").readlink()
            if not arguments or point not in (cwd / argument for argument in arguments[1:]):
                continue
            with suppress(OSError):
                pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            found.append((arguments, cwd, env))
    return found


def _rclone(point: Path, arguments: list[str], cwd: Path, env: dict[str, str]) -> Mount:
    """rclone: without a cache for writes it writes through; with one, a log of level INFO or DEBUG tells."""

    def option(name: str, default: str) -> str:
        value = env.get(f"RCLONE_{name.upper().replace('-', '_')}", default)
        for index, argument in enumerate(arguments):
            if argument == f"--{name}" and index + 1 < len(arguments):
                value = arguments[index + 1]
            elif argument.startswith(f"--{name}="):
                value = argument.partition("=")[2]
        return value

    # `minimal` caches what is opened for reading and writing at once, which nothing of ours is.
    if option("vfs-cache-mode", "off").lower() in ("off", "minimal"):
        return Mount(point, "rclone", Proof.READ_BACK)
    log, kind = option("log-file", ""), "rclone with a cache"
    talks = option("log-level", "").upper() in ("INFO", "DEBUG") or {"-v", "-vv", "--verbose"} & {*arguments}
    if not log or not talks or not (cwd / log).exists():
        return Mount(point, kind, Proof.NOTHING)
    return Mount(point, kind, Proof.UPLOAD_LOG, cwd / log)


class UploadLog:
    """Which files rclone says it has uploaded. A file's last word counts; what is added to the log is read once."""

    def __init__(self, log: Path) -> None:
        """Begin at the log's beginning."""
        self._log = log
        self._at = 0
        self._rest = b""
        self._uploaded: set[str] = set()
        self._reading = threading.Lock()

    def has(self, path: PurePath) -> bool:
        """Whether a file, by its path below the mount point, is in the store.

        Raises:
            OSError: the log cannot be read.
        """
        with self._reading:
            self._read_on()
        return path.as_posix() in self._uploaded

    def _read_on(self) -> None:
        with self._log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._at:  # Begun anew.
                self._at, self._rest = 0, b""
            file.seek(self._at)
            data = file.read()
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if found := _UPLOADED.match(line):
                name = found[1].decode(errors="replace")
                (self._uploaded.add if found[2] == b"upload succeeded" else self._uploaded.discard)(name)
