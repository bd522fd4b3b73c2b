"""This user's home folder, and a substitute if there is none. Standard library only.

A container may run as a user without a passwd entry, without HOME, or with a HOME that cannot be written. What belongs
into the home folder then goes into a temporary folder of this user, which lasts as long as the machine's disk.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# The variables that tell training's libraries where to keep their caches, and the defaults below the home folder.
_CACHES = {"XDG_CACHE_HOME": ".cache", "HF_HOME": ".cache/huggingface", "TRITON_CACHE_DIR": ".triton/cache"}


def home() -> Path | None:
    """This user's home folder by HOME or passwd; None if there is none."""
    with suppress(RuntimeError):
        folder = Path.home()
        if _is_or_can_be(folder):
            return folder
    return None


def cache() -> Path | None:
    """An existing folder for this machine's own records and copies; None if no folder can be written."""
    if folder := home():
        made = folder / ".cache" / "skyspot"
        with suppress(OSError):
            made.mkdir(parents=True, exist_ok=True)
            if os.access(made, os.W_OK | os.X_OK):
                return made
    return temporary()


def setup_seconds() -> int | None:
    """The seconds that setup.sh took on this machine; None if it did not run."""
    folder = home()
    with suppress(OSError, ValueError):
        return int((folder / "skyspot" / "setup-seconds").read_text()) if folder else None
    return None


def since_setup_seconds() -> float | None:
    """The seconds since setup.sh ended on this machine; None if it did not run."""
    folder = home()
    with suppress(OSError):
        if folder:
            return round(max(0.0, time.time() - (folder / "skyspot" / "setup-seconds").stat().st_mtime), 1)
    return None


def temporary() -> Path | None:
    """This user's own temporary folder, the same for all attempts; None if it cannot be made."""
    with suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"skyspot-of-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        # Another user may have made a folder of that name: do not write into it.
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def substitutes(env: Mapping[str, str] = os.environ) -> tuple[dict[str, str], str]:
    """(variables that replace a home folder that is missing or read-only, the line to print about it).

    Both are empty if the home folder can be written. A read-only home folder, or cache in it, is still read.
    """
    found: dict[str, str] = {}
    folder = home()
    if folder is None:
        if stand_in := temporary():
            found["HOME"] = str(stand_in)
        why = "HOME is not set, and this user has no passwd entry"
        if env.get("HOME"):
            why = f"HOME is {env['HOME']}, which is not a folder and cannot be created"
    else:
        why = f"{folder} cannot be written"
        for name, place in _CACHES.items():
            if not env.get(name) and not _is_or_can_be(folder / place) and (instead := temporary()):
                found[name] = str(instead / place)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # Libraries that name folders after the user would fail.
        found["USER"] = f"user-{os.getuid()}"
    if not found.keys() - {"USER"}:
        return found, ""
    return found, f"{why}: caches go to {temporary()}"


def stand_in() -> None:
    """Give this process and its children a substitute for a home folder that cannot be written, and print a line."""
    found, note = substitutes()
    os.environ.update(found)
    if note:
        print(note, file=sys.stderr, flush=True)


def _is_or_can_be(folder: Path) -> bool:
    """True if the folder exists, even read-only, or can be made."""
    try:
        for above in (folder, *folder.parents):
            if above.exists():
                return above.is_dir() and (above == folder or os.access(above, os.W_OK | os.X_OK))
    except OSError:  # This user may not look there.
        pass
    return False
