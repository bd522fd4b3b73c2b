"""Lines that a result has more often than it should: a restart appends again what it does again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

REPEATED = "repeated lines"
"""Cause of a difference."""
LARGEST = 20_000_000
"""A file with more bytes is not read."""
_SUFFIXES = {".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".log"}


def repeated_lines(left: Path, right: Path) -> str:
    """Say how many lines of a file are there again; empty if that is not the only difference.

    Args:
        left: The undisturbed run's file.
        right: The preempted run's.
    """
    if left.suffix.lower() not in _SUFFIXES or max(path.stat().st_size for path in (left, right)) > LARGEST:
        return ""
    ours, theirs = (Counter(path.read_bytes().splitlines()) for path in (left, right))
    more = theirs - ours
    if ours - theirs or not more or any(line not in ours for line in more):
        return ""
    return f"all {ours.total()} lines are there, and {more.total()} of them again"
