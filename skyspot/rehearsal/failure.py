"""A failed attempt: what it said, and its output, which outlives the rehearsal."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from skyspot.rehearsal import scratch
from skyspot.rehearsal.excerpt import read_excerpt

_READ_BYTES = 2_000_000
_WORKERS = re.compile(r"Error: DataLoader worker .* (killed by signal: Terminated|exited unexpectedly)")
_LOADER = re.compile(r'File ".*/torch/utils/data/dataloader\.py", line \d+')
_GONE = re.compile(r"^(?:\[rank\d+\]: *)?(?:ConnectionResetError|EOFError|FileNotFoundError|BrokenPipeError)\b")
"""What the main process meets if it waits for a worker's answer when that dies: whoever notices first decides."""


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

    A loader's workers are in the same process group. PyTorch raises an error when one of them dies of the signal, or
    its main process meets the closed connection first.
    """
    lines = _end(log).splitlines()
    last = next((line for line in reversed(lines) if _WORKERS.search(line)), "") or _lost_worker(lines)
    return (
        f"its loader workers died of SIGTERM, and then its main process failed: {last.strip().rstrip('.')}"
        if last
        else ""
    )


def _lost_worker(lines: Sequence[str]) -> str:
    """The last line of a traceback through the loader that ends at a closed connection; empty if there is none."""
    found, in_loader = "", False
    for line in lines:
        if "Traceback (most recent call last)" in line:
            in_loader = False
        in_loader = in_loader or bool(_LOADER.search(line))
        if in_loader and _GONE.search(line):
            found, in_loader = line, False
    return found


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
