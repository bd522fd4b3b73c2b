"""Temporary folders on this machine's own disks, and which folder to blame when a disk is full. Standard library only.

A process of the trainer ends with os._exit, or by SIGKILL: no clean-up of Python's runs. Each folder is locked by its
process, and the kernel releases the lock however the process ends. A folder of this user's that nobody holds is stale,
and the next process that needs a temporary folder deletes it. A lock is not always seen on other machines that share a
file system (NFS, Lustre): each deletes only what it made itself.
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
"""Left free beside what a temporary folder is expected to hold."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_BYTES = 1 << 20
REMOVE_S = 5.0
"""How long the removal of the temporary folders may hold up the end of the process."""

_mine: dict[Path, int] = {}
"""The folders of this process, and the descriptors that hold their locks."""


class ScratchError(TrainerError):
    """A disk of this machine's is full or cannot be written. Another machine may have room."""

    code = EXIT_PREEMPTED


@contextmanager
def folder(purpose: str, needed: int = 0) -> Iterator[Path]:
    """A new temporary folder, deleted afterwards.

    Args:
        purpose: A word for its name.
        needed: How many bytes it is expected to hold: decides where it is made.

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
    """Say that what happens inside writes to a disk of this machine's: it is not the bucket that is full.

    Raises:
        ScratchError: the disk is full; names the folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full(where, error.strerror) from None
        raise


def full(where: Path, reason: str | None = None, needed: int = 0) -> ScratchError:
    """The error of a full disk: what, where, and the remedy."""
    free, wants = _free(where), f"{needed / 1e9:.1f} GB needed, " if needed else ""
    left = "" if free is None else f" ({wants}{free / 1e9:.1f} GB free)"
    return ScratchError(
        f"{where}: {reason or os.strerror(errno.ENOSPC)}{left}. Make room there, take a machine with a larger disk, or "
        "set TMPDIR to a folder with room; nothing that was committed is lost."
    )


def place(needed: int) -> Path:
    """Where a temporary folder of so many bytes goes: the first place with room, else the one with the most.

    Raises:
        ScratchError: there is none that can be written.
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
    """Where temporary folders may go, the user's choice first."""
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    home = os.environ.get("HOME")
    paths = [Path(name) for name in (*named, "/tmp", "/var/tmp", home and f"{home}/.cache") if name]
    return list(dict.fromkeys(path.absolute() for path in paths))


def blamed(error: OSError, otherwise: Path) -> str:
    """Which file or folder an error is about: the one that it names; of a full disk, the local one that is full."""
    if error.filename:
        return os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else str(otherwise)
    where = full_place(otherwise) if error.errno in FULL else None
    return str(where or otherwise)


def full_place(otherwise: Path) -> Path | None:
    """A full local disk that temporary files or the hub's files go to, and `otherwise` does not lie on."""
    caches = [Path(cache) for name in ("HF_HOME", "HF_HUB_CACHE") if (cache := os.environ.get(name))]
    for path in [*places(), *caches]:
        if is_full(path) and not _on_one_disk(path, otherwise):
            return path
    return None


def is_full(path: Path) -> bool:
    """Whether nothing more can be written there."""
    space = _free(path, writable=False)
    return space is not None and space < _FULL_BYTES


def remove_all() -> None:
    """Delete the temporary folders of this process, which is about to end; within a few seconds."""
    if _mine:
        thread = threading.Thread(target=lambda: [_remove(path) for path in list(_mine)], daemon=True)
        thread.start()
        thread.join(REMOVE_S)


def remove_stale() -> None:
    """Delete what processes of this user's left behind that are gone."""
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
    """Delete a folder that is made as `_locked` does it, by this user on this machine, and is locked by nobody."""
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
    """What a lock says of the machine that made it."""
    return socket.gethostname().encode()[:256]


def _locked(where: Path, prefix: str) -> Path:
    """A new folder whose lock this process holds."""
    while True:
        top = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
        descriptor = -1
        try:
            descriptor = os.open(top / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(OSError):  # Without locks, or room for a word, nothing is ever seen to be stale there.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.write(descriptor, _here())
            made = top / "made"
            made.mkdir()
        except BaseException as error:
            if descriptor >= 0:
                os.close(descriptor)
            if isinstance(error, FileNotFoundError) and not top.exists():
                continue  # Somebody who looked for stale folders was quicker than the lock.
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
    """Bytes that this user can still write in a folder; None where it is no folder or cannot be written."""
    with suppress(OSError):
        if writable and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            return None
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize if stat.f_favail or not stat.f_files else 0
    return None
