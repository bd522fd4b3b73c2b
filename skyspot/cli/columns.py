"""Tables for a terminal: columns, and lines that are folded to fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table with these columns; those of `right` are aligned to the right."""
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        wide = column == "resources"
        found.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=not wide)
    return found


def show(table: Table) -> None:
    """Print a table; a terminal that is too narrow wraps its lines, so nothing is cut off."""
    needed = 0
    for column in table.columns:
        text = "\n".join(map(str, (column.header, *column.cells)))
        needed += max(map(cell_len, text.split("\n") if column.no_wrap else text.split())) + 2
    console = Console(highlight=False, markup=False, emoji=False)  # Cells are users' text.
    console.width = max(console.width, needed)
    console.print(table)


def say(lines: Iterable[str]) -> None:
    """Print lines; a terminal wraps them between words, in a pipe each stays whole."""
    console = Console(highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)


def fold(parts: Sequence[str], joint: str, width: int) -> str:
    """The parts joined on as few lines as fit the width; a part is never broken."""
    end = joint.rstrip()
    lines = [parts[0]]
    for at, part in enumerate(parts[1:], 2):
        after = len(end) if at < len(parts) else 0
        if len(lines[-1]) + len(joint) + len(part) + after <= width:
            lines[-1] += joint + part
        else:
            lines[-1] += end
            lines.append(f"  {part}")
    return "\n".join(lines)
