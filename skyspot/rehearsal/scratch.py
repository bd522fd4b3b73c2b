"""The temporary folders of a rehearsal, and those that a killed one left behind.

A process that is killed deletes nothing. So each folder holds a file with its owner's lock, which the kernel releases
however the process ends. The next rehearsal deletes the folders of this user that nobody locks. The file says on which
machine and under which name the folder was made: locks of other machines on a shared file system are not always seen,
and a copy that somebody made of a folder is not ours.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skyspot.rehearsal.processes import is_held, kill_below

PREFIX = "skyspot-"
OWNER = ".owner"

_mine: dict[Path, int] = {}
"""By temporary folder of this process: the descriptor that holds its lock."""


@contextmanager
def folder(purpose: str) -> Iterator[Path]:
    """Make a temporary folder, and delete it afterwards.

    Raises:
        OSError: it cannot be made.
    """
    made = make(purpose)
    try:
        yield made
    finally:
        remove(made)


def make(purpose: str) -> Path:
    """Make a temporary folder that is deleted by `remove`, or by the next rehearsal if this process is killed.

    Raises:
        OSError: it cannot be made.
    """
    made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-")).resolve()
    descriptor = -1
    try:
        descriptor = os.open(made / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # Without locks, no folder there ever counts as left behind.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, _content(made))
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        shutil.rmtree(made, ignore_errors=True)
        raise
    _mine[made] = descriptor
    return made


def remove(made: Path) -> None:
    """Delete a folder of `make`."""
    _delete_owned(made)
    os.close(_mine.pop(made))


def remove_all() -> None:
    """Delete the folders of this process that are not kept."""
    for made in list(_mine):
        remove(made)


def keep(made: Path) -> None:
    """Leave a folder of `make` to the user: no rehearsal deletes it."""
    (made / OWNER).unlink(missing_ok=True)
    os.close(_mine.pop(made))


def remove_stale() -> None:
    """Delete the folders of this user's rehearsals that were killed, and kill the processes that they left."""
    with suppress(OSError):
        for entry in list(os.scandir(tempfile.gettempdir())):
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_stale(Path(entry.path).resolve())


def _remove_if_stale(found: Path) -> None:
    if found in _mine or found.lstat().st_uid != os.getuid():
        return
    descriptor = os.open(found / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.read(descriptor, 4096) == _content(found):
            kill_below(str(found))
            if not is_held(str(found), without=str(found / OWNER)):
                _delete_owned(found)
    finally:
        os.close(descriptor)


def _content(made: Path) -> bytes:
    """What the lock's file of a folder holds."""
    return f"skyspot rehearse on {socket.gethostname()}: {made.name}\n".encode()


def _delete_owned(made: Path) -> None:
    """Delete a folder, and its owner's file last: if this process is killed, the next rehearsal goes on."""
    for entry in list(os.scandir(made)):
        if entry.is_dir(follow_symlinks=False):
            delete_tree(Path(entry.path))
        elif entry.name != OWNER:
            Path(entry.path).unlink(missing_ok=True)
    if [entry.name for entry in os.scandir(made)] == [OWNER]:
        shutil.rmtree(made, ignore_errors=True)


def delete_tree(path: Path) -> None:
    """Delete a folder, with what a task has made read-only in it."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        _make_writable(path)
        shutil.rmtree(path, ignore_errors=True)


def _make_writable(path: Path) -> None:
    with suppress(OSError):
        path.chmod(0o700)
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                _make_writable(Path(entry.path))
