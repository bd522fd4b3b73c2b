"""The parts of docs/performance.md: each bench writes its own, and leaves the others as they are."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PERFORMANCE = REPO / "docs" / "performance.md"
REHEARSAL = "The time of a rehearsal"
CKPT_CHAOS = "A rehearsal beside ckpt-chaos"
CKPT_CHAOS_LOOPS = "ckpt-chaos on Hugging Face's Trainer and on Lightning"
LOOP = "A loop with skyspot and without"
WATCHERS = "A loop with the watchers and without"
STOPS = "From a notice to the commit"
BUCKETFS = "A bucket served through FUSE"
LATER = (LOOP, WATCHERS, STOPS, REHEARSAL, BUCKETFS, CKPT_CHAOS, CKPT_CHAOS_LOOPS)
"""Headings of the parts that follow the first bench's, in their order."""


def later(report: Path) -> dict[str, str]:
    """The parts with these headings that a report has, by heading."""
    return _split(report.read_text())[1] if report.exists() else {}


def joined(first: str, parts: dict[str, str]) -> str:
    """A report of the first bench's part and those with these headings."""
    return "\n\n".join([first.strip(), *(parts[heading] for heading in LATER if heading in parts)]) + "\n"


def put(report: Path, heading: str, text: str) -> None:
    """Write a part into a report, in place of the one with that heading."""
    first, parts = _split(report.read_text() if report.exists() else "# Performance")
    report.write_text(joined(first, {**parts, heading: f"## {heading}\n\n{text.strip()}"}))


def report(place: Path, heading: str, text: str, broken: list[str]) -> int:
    """Write a part into a report, print it and each bound that does not hold; the exit status: 1 if there is one."""
    put(place, heading, text)
    print(text)
    for line in broken:
        print(f"does not hold: {line}", file=sys.stderr)
    return 1 if broken else 0


def paragraphs(*parts: str) -> str:
    """Join paragraphs, wrapped; tables and lists are left as they are."""
    return "\n\n".join(part if part.startswith(("|", "-")) else textwrap.fill(part, 120) for part in parts)


def when(command: str, load: tuple[float, float]) -> str:
    """A line: by what and when a part was measured."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    average = f"{load[0]:.1f} before, {load[1]:.1f} after, including the bench itself"
    return f"Measured by `{command}`, {date}. Load average: {average}."


def _split(text: str) -> tuple[str, dict[str, str]]:
    first, *rest = text.split("\n## ")
    parts: dict[str, str] = {}
    for part in rest:
        heading = part.partition("\n")[0]
        if heading in LATER:
            parts[heading] = f"## {part.strip()}"
        else:
            first += f"\n## {part}"
    return first, parts
