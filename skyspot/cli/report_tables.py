"""A run's report as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyspot.money import sentences
from skyspot.money.report import AttemptReport, Report
from skyspot.money.sentences import MONEY, NAMES, REST
from skyspot.money.timeline import Band, Piece, cells
from skyspot.wording import duration, printable

MAX_NOTES = 12
MAX_BARS = 20
"""With more attempts, one bar shows them all."""
OTHER_TIME = "Other time"
"""What the rest is called where goodput is not beside it."""
_WIDTH = 12
_LEAST_BAR = 20
_MARKS = {
    "waiting": (".", "dim"), "setup": ("s", "cyan"), "restore": ("r", "cyan"), "productive": ("#", "green"),
    "data": ("d", "magenta"), "evaluation": ("e", "magenta"), "saving": ("+", "yellow"), "lost": ("x", "red"),
    "other": ("-", "dim"),
}  # fmt: skip
"""How a timeline shows each kind of time: a character, and a colour where the terminal has some."""


def show(report: Report, bands: Sequence[Band]) -> None:
    """Print a report with its timeline."""
    headline = printable(f"{report.root}: {sentences.state(report)}")
    click.echo(f"{headline}. Times are UTC, by each machine's own clock.")
    _print(_table(report.attempts))
    width = Console().width
    _print_timeline(bands, width)
    for name, text in sentences.summary(report):
        click.echo(_wrapped(name, printable(text), width, ", " if name == REST else "; "))
    notes = sentences.notes(report)
    for note in notes[:MAX_NOTES]:
        click.echo(f"Note: {printable(note)}")
    if len(notes) > MAX_NOTES:
        click.echo(f"Note: {len(notes) - MAX_NOTES} more; --json has all.")


def show_short(report: Report, bands: Sequence[Band]) -> None:
    """Print the timeline, where the time went that is not in goodput, and the money."""
    width = Console().width
    _print_timeline(bands, width)
    for name, text in sentences.summary(report):
        if name in (REST, *MONEY):
            label = OTHER_TIME if name == REST else name
            click.echo(_wrapped(label, printable(text), width, ", " if name == REST else "; "))


def _wrapped(name: str, text: str, width: int, joint: str = "; ") -> str:
    """A line of the summary, broken between its parts where there are several."""
    indent = " " * (_WIDTH + 1)
    first, *others = text.split(joint)
    lines = [f"{name:<{_WIDTH}} {first}"]
    for number, part in enumerate(others, 1):
        after = len(joint.rstrip()) if number < len(others) else 0
        if len(lines[-1]) + len(joint) + len(part) + after <= width:
            lines[-1] += joint + part
        else:
            lines[-1] += joint.rstrip()
            lines.append(indent + part)
    return "\n".join(lines)


# -- the attempts ------------------------------------------------------------------------------------------------------


def _table(attempts: Sequence[AttemptReport]) -> Table:
    """A row for each attempt; columns without a value are left out."""
    rows = [sentences.cells(one) for one in attempts]
    shown = sentences.shown_columns(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in shown:
        left = name in ("where", "from", "to", "ended", "steps")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(row[name])) for name in shown))
    return table


def _print(table: Table) -> None:
    """Print a table; a terminal that is too narrow wraps its lines, so nothing is cut off."""
    needed = sum(max(cell_len(str(cell)) for cell in (one.header, *one.cells)) + 2 for one in table.columns)
    console = Console(highlight=False)
    console.width = max(console.width, needed)
    console.print(table)


# -- the timeline ------------------------------------------------------------------------------------------------------


def _print_timeline(bands: Sequence[Band], width: int) -> None:
    """Print a bar for each attempt, or one for all, that begins with the wait for its machine; and what it shows."""
    bars = [(str(band.number), band.start_s, band.end_s, band.pieces) for band in bands]
    if len(bars) > MAX_BARS:
        bars = [("", 0.0, bands[-1].end_s, tuple(piece for band in bands for piece in band.pieces))]
    labels = max(len(label) for label, *_ in bars)
    room = max(_LEAST_BAR, width - _WIDTH - labels - 2)
    scale = max(end - start for _, start, end, _ in bars) / room
    if not scale:
        return
    console = Console(highlight=False)
    shown: set[str] = set()
    for number, (label, start, end, pieces) in enumerate(bars):
        kinds = _bar(pieces, start, end, scale, room)
        shown |= set(kinds)
        text = Text(f"{'' if number else 'Timeline':<{_WIDTH}} {label:>{labels}}{' ' if labels else ''}")
        for kind in kinds:
            text.append(*_MARKS[kind])
        console.print(text, soft_wrap=True)
    legend = ", ".join(f"{mark} {NAMES[kind]}" for kind, (mark, _) in _MARKS.items() if kind in shown)
    click.echo(_wrapped("", f"{legend}, a character is {duration(scale)}", width, ", "))


def _bar(pieces: Sequence[Piece], start: float, end: float, scale: float, room: int) -> list[str]:
    count = min(room, max(1, math.ceil((end - start) / scale - 1e-9)))
    return [kind for kind in cells(pieces, start, scale, count) if kind]
