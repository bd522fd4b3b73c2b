"""A failed attempt: what it said, and its output, which outlives the rehearsal."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from skyspot.rehearsal import scratch
from skyspot.rehearsal.excerpt import read_excerpt

_READ_BYTES = 2_000_000
_WORKERS = re.compile(r"Error: DataLoader worker .* (killed by signal: Terminated|exited unexpectedly)")


def describe(ended: str, log: Path, machine: Path) -> str:
    """How an attempt ended, with the error that the output shows, else with the last lines.

    Args:
        ended: How it ended.
        log: The file with the attempt's output.
        machine: The machine's folder.
    """
    found = read_excerpt(_end(log), str(machine))
    title = f"{ended}; last lines of its output:" if found.lines and not found.is_cause else ended
    return "\n".join([title, *(f"  {line}" for line in found.lines)])


def _end(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _READ_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def at_sigterm(log: Path) -> str:
    """Say why a program failed at SIGTERM, if its output shows it; otherwise empty.

    A loader's workers are in the same process group. PyTorch raises an error when one of them dies of the signal.
    """
    last = next((line for line in reversed(_end(log).splitlines()) if _WORKERS.search(line)), "")
    return (
        f"its loader workers died of SIGTERM, and then its main process failed: {last.strip().rstrip('.')}"
        if last
        else ""
    )


def keep_log(log: Path, name: str, kept: bool) -> Path | None:
    """Copy the output of an attempt to a new temporary folder, which the rehearsal keeps if it comes to its end.

    Args:
        log: The file with the output.
        name: The copy's name.
        kept: Whether the file itself is kept, so that there is no need for a copy.

    Returns: the file that is kept; None if there is none.
    """
    if kept:
        return log
    with suppress(OSError):
        folder = scratch.make("rehearsal-log")
        with suppress(OSError):
            return Path(shutil.copyfile(log, folder / name))
        scratch.remove(folder)
    return None
