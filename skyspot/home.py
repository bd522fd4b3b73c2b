"""Paths below the home folder, also for a user who has none: a container may run without HOME and a passwd entry."""

from __future__ import annotations

import getpass
import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """A path with its `~` filled in; as it stands where nobody knows this user's home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def unknown_user() -> str | None:
    """What SkyPilot cannot do without and nothing tells: which variables to set; None where it is all known."""
    missing = [] if str(expanded("~")) != "~" else ["HOME"]
    try:
        getpass.getuser()
    except (KeyError, OSError):
        missing.append("USER")
    if not missing:
        return None
    return f"this user ({os.getuid()}) has no passwd entry: set {' and '.join(missing)}, which SkyPilot needs"
