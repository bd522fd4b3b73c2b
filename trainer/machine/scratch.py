"""Temporary folders on this machine's own disks, and the folder to name when a disk is full. Standard library only.

A process of the trainer ends with os._exit or by SIGKILL, so Python's clean-up never runs. Each process locks its
temporary folders, and the kernel releases the locks however the process ends. A folder of this user that nobody locks
is stale: the next process that needs a temporary folder deletes it. Machines that share a file system (NFS, Lustre) do
not always see each other's locks, so each machine deletes only its own folders.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import TrainerError
from trainer.layout.exit_codes import EXIT_PREEMPTED

PREFIX = "skyspot-"
SPARE_BYTES = 64 << 20
"""Room to leave beside the expected size of a temporary folder."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_BYTES = 1 << 20
REMOVE_S = 5.0
"""The time by which removing the temporary folders may delay the end of the process."""

_mine: dict[Path, int] = {}
"""By temporary folder of this process: the descriptor that holds its lock."""


class ScratchError(TrainerError):
    """A disk of this machine is full or cannot be written; another machine may have room."""

    code = EXIT_PREEMPTED


@contextmanager
def folder(purpose: str, needed: int = 0) -> Iterator[Path]:
    """Make a temporary folder, and delete it afterwards.

    Args:
        purpose: A word for its name.
        needed: The expected size in bytes, which decides where it is made.

    Raises:
        ScratchError: no folder for temporary files can be written.
    """
    where = place(needed)
    remove_stale()
    with local(where):
        made = _locked(where, f"{PREFIX}{purpose}-")
    try:
        yield made
    finally:
        _remove(made)


@contextmanager
def local(where: Path) -> Iterator[None]:
    """Mark a block that writes to a local disk, so that a full disk is not taken for a full bucket.

    Raises:
        ScratchError: the disk is full; the message names the folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full(where, error.strerror) from None
        raise


def full(where: Path, reason: str | None = None, needed: int = 0) -> ScratchError:
    """The error for a full disk: what, where, and the remedy."""
    free, wants = _free(where), f"{needed / 1e9:.1f} GB needed, " if needed else ""
    left = "" if free is None else f" ({wants}{free / 1e9:.1f} GB free)"
    return ScratchError(
        f"{where}: {reason or os.strerror(errno.ENOSPC)}{left}. Make room there, take a machine with a larger disk, or "
        "set TMPDIR to a folder with room; nothing that was committed is lost."
    )


def place(needed: int) -> Path:
    """The place for a temporary folder of so many bytes: the first with room, or else the one with the most room.

    Raises:
        ScratchError: no place can be written.
    """
    found = [(space, path) for path in places() if (space := _free(path)) is not None]
    if not found:
        raise ScratchError(
            f"no folder for temporary files can be written ({', '.join(map(str, places()))}); set TMPDIR"
        )
    for space, path in found:
        if space >= needed + SPARE_BYTES:
            return path
    return max(found, key=lambda one: one[0])[1]


def places() -> list[Path]:
    """All places for temporary folders, the user's choice first."""
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    home = os.environ.get("HOME")
    paths = [Path(name) for name in (*named, "/tmp", "/var/tmp", home and f"{home}/.cache") if name]
    return list(dict.fromkeys(path.absolute() for path in paths))


def blamed(error: OSError, otherwise: Path) -> str:
    """The file or folder that an error is about: the one that it names, or a local folder whose disk is full."""
    if error.filename:
        return os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(otherwise)
    where = full_place(otherwise) if error.errno in FULL else None
    return str(where or otherwise)


def full_place(otherwise: Path) -> Path | None:
    """A folder for temporary or Hub files on a full local disk, unless `otherwise` is on that disk too."""
    caches = [Path(cache) for name in ("HF_HOME", "HF_HUB_CACHE") if (cache := os.environ.get(name))]
    for path in [*places(), *caches]:
        if is_full(path) and not _on_one_disk(path, otherwise):
            return path
    return None


def is_full(path: Path) -> bool:
    """True if nothing more can be written there."""
    space = _free(path, writable=False)
    return space is not None and space < _FULL_BYTES


def remove_all() -> None:
    """Delete this process's temporary folders before it ends, within a few seconds."""
    if _mine:
        thread = threading.Thread(target=_remove_mine, daemon=True)
        thread.start()
        thread.join(REMOVE_S)


def _remove_mine() -> None:
    for path in list(_mine):
        _remove(path)


def remove_stale() -> None:
    """Delete the temporary folders that this user's dead processes left behind."""
    for where in places():
        with suppress(OSError):
            for entry in list(os.scandir(where)):
                if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                    with suppress(OSError):
                        _remove_if_stale(Path(entry.path))


def _on_one_disk(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.stat().st_dev == other.stat().st_dev
    return False


def _remove_if_stale(path: Path) -> None:
    """Delete a folder if `_locked` made it for this user on this machine, and nobody locks it."""
    if path in _mine or path.lstat().st_uid != os.getuid():
        return
    if not {".lock"} <= {entry.name for entry in path.iterdir()} <= {".lock", "made"}:
        return
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(descriptor, 256) != _here():
            return
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _here() -> bytes:
    """The content of a lock file: the machine that made it."""
    return socket.gethostname().encode()[:256]


def _locked(where: Path, prefix: str) -> Path:
    """Make a folder, and hold its lock in this process."""
    while True:
        top = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
        descriptor = -1
        try:
            descriptor = os.open(top / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(OSError):  # Without locks, or room for the content, no folder there ever counts as stale.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.write(descriptor, _here())
            made = top / "made"
            made.mkdir()
        except BaseException as error:
            if descriptor >= 0:
                os.close(descriptor)
            if isinstance(error, FileNotFoundError) and not top.exists():
                continue  # Another process took it for stale before it was locked.
            shutil.rmtree(top, ignore_errors=True)
            raise
        _mine[top] = descriptor
        return made


def _remove(path: Path) -> None:
    top = path.parent if path.parent in _mine else path
    shutil.rmtree(top, ignore_errors=True)
    if top.exists():  # A thread was still writing into it.
        shutil.rmtree(top, ignore_errors=True)
    descriptor = _mine.pop(top, None)
    if descriptor is not None:
        os.close(descriptor)


def _free(path: Path, writable: bool = True) -> int | None:
    """Bytes that this user can still write in a folder; None if it is no folder or cannot be written."""
    with suppress(OSError):
        if writable and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            return None
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize if stat.f_favail or not stat.f_files else 0
    return None
