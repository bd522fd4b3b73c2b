"""Reasons to skip a test: `GUARANTEE: REMEDY`, or `GUARANTEE: not on this machine: WHY` if there is no remedy."""

import os
import shutil

NOT_HERE = "not on this machine"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The program of a Chromium; None: there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def needs_root(guarantee: str) -> str:
    """The reason to skip when the system refused something that root may usually do."""
    return f"{guarantee}: run the tests as root" if os.geteuid() else f"{guarantee}: {NOT_HERE}: refused to root"
