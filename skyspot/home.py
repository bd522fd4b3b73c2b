"""Paths below the home folder, which is unknown in a container without HOME and without a passwd entry."""

from __future__ import annotations

import getpass
import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """A path with its `~` expanded; unchanged if this user's home folder is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def unknown_user() -> str | None:
    """An error that names the variables SkyPilot needs to know this user; None if the user is known."""
    missing = [] if str(expanded("~")) != "~" else ["HOME"]
    try:
        getpass.getuser()
    except (KeyError, OSError):
        missing.append("USER")
    if not missing:
        return None
    return f"this user ({os.getuid()}) has no passwd entry; set {' and '.join(missing)}, which SkyPilot needs"
