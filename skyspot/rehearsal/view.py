"""The live view of a rehearsal on a terminal; elsewhere, a line per event."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from skyspot.rehearsal import attempts
from skyspot.rehearsal.result import Kind, Leg, Result, Row

_NO_TERMINAL = 1000
"""Columns where no terminal limits them: a table is as wide as it needs."""


class View:
    """Shows legs and attempts as they run. A context manager."""

    def __init__(self, quiet: bool = False) -> None:
        """Create the view; with `quiet` it prints nothing (the result is printed as JSON)."""
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        if not self._console.is_terminal and "COLUMNS" not in os.environ:
            self._console.width = _NO_TERMINAL
        self._live = Live(console=self._console, refresh_per_second=8, transient=True) if self._lively else None
        self._leg, self._rows, self._now, self._steps = "", list[Row](), "", 0

    @property
    def _lively(self) -> bool:
        return self._console.is_terminal and not self._console.quiet

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if error is not None and self._rows:
            self._console.print(table(self._rows))  # Keep the rows so far on the screen.

    def print_line(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    def leg(self, title: str, steps: int | None = None) -> None:
        """Start a leg."""
        self._leg, self._rows, self._now, self._steps = title, [], "", steps or 0
        self.print_line(title)

    def attempt(self, number: int, processes: int, plan: str) -> None:
        """Start an attempt."""
        many = f"{processes} processes" if processes > 1 else "1 process"
        self._now = f"attempt {number}, {many}: {plan}"
        self.step(None)

    def step(self, step: int | None) -> None:
        """Show the attempt's last step."""
        if self._live:
            bar = ""
            if self._steps:
                filled = round(30 * (step or 0) / self._steps)
                bar = f"  {'━' * filled}{'╌' * (30 - filled)}"
            where = f"step {step}" if step else "starting"
            self._live.update(Group(table(self._rows), Text(f"  {self._now}"), Text(f"  {where}{bar}", style="cyan")))

    def ended(self, row: Row) -> None:
        """End an attempt. Without a terminal, its row appears in the table at the end of the leg."""
        self._rows.append(row)

    def leg_done(self, leg: Leg) -> None:
        """End a leg and print its table."""
        if self._live:
            self._live.update(Text(""))
        self._rows = []
        if leg.name not in ("reference", "control"):
            self._console.print(table(leg.rows))
            lost = sum(row.lost_steps or 0 for row in leg.rows)
            starts = sum(row.first_step_s or 0.0 for row in leg.rows)
            if leg.goodput is not None:
                self.print_line(
                    f"   {lost} lost steps; goodput {leg.goodput:.0%} of {leg.seconds:.0f} s "
                    f"({len(leg.rows)} starts took {starts:.0f} s)"
                )
            elif again := attempts.done_again(leg.rows):
                self.print_line(f"   {again}")

    def result(self, result: Result) -> None:
        """Print the verdicts."""
        if result.kinds:
            self._console.print(kinds_table(result.kinds))
        printed = set[str]()
        for leg in result.legs:
            if not leg.verdict or (leg.verdict.exact and leg.verdict.text in printed):
                continue  # Legs that go on with what another left say the same.
            printed.add(leg.verdict.text)
            style = "bold green" if leg.verdict.exact else "bold red"
            self._console.print(Text(f"{leg.title}: ", style="bold"), Text(leg.verdict.text, style=style), sep="")
            if leg.verdict.remedy and leg.verdict.remedy not in printed:
                printed.add(leg.verdict.remedy)
                self.print_line(f"  remedy: {leg.verdict.remedy}")
            for note in leg.verdict.notes:
                self.print_line(f"  note: {note}")
        for note in result.notes:
            self.print_line(f"note: {note}")


_STYLES = {"exact": "green", "not tried": "dim", "not checked": "yellow"}


def kinds_table(kinds: list[Kind]) -> Table:
    """Build the table by kind of preemption."""
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "kind", "verdict", "what was struck"):
        found.add_column(name, no_wrap=name != "what was struck")
    for number, kind in enumerate(kinds, 1):
        found.add_row(str(number), kind.kind, Text(kind.outcome, style=_STYLES.get(kind.outcome, "bold red")), kind.why)
    return found


def table(rows: Sequence[Row]) -> Table:
    """Build the table of a leg's attempts."""
    columns, lines = attempts.table(rows)
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        text = name in attempts.TEXT
        found.add_column(name, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for line in lines:
        found.add_row(*line)
    return found
