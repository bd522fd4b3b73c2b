"""The file that a page is written to."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from skyspot.errors import SkyspotError, UsageError, shown


def check(path: Path) -> None:
    """Check that a page can be drawn, and that its file can be written.

    Raises:
        NoPlotsError: matplotlib is not installed.
        UsageError: there is no such folder, or something else has the file's name.
        SkyspotError: the folder may not be written to.
    """
    from skyspot.page.page import check_plots

    check_plots()
    if path.exists() and not path.is_file():
        raise UsageError(f"--html: {shown(str(path))} is a {'folder' if path.is_dir() else 'device'}. Name a file")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"--html: there is no folder {shown(str(folder))}. Make it first: mkdir -p")
    if not os.access(folder, os.W_OK):
        raise SkyspotError(f"--html: {shown(str(folder))} may not be written to. Name another folder")


def write(path: Path, text: str) -> None:
    """Write a page as a whole; an older one is replaced in one step.

    Raises:
        SkyspotError: it cannot be written.
    """
    path = path.resolve()  # Where it is a link, its target is replaced.
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise SkyspotError(f"--html: {shown(str(path))} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
