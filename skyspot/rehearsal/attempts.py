"""The table of a leg's attempts: its columns and words."""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.rehearsal import faults
from skyspot.rehearsal.result import Row

TEXT = ("how it ended", "resumed from", "in the bucket")
"""Columns of text; the others are numbers."""
_COLUMNS = (
    "", "how it ended", "after", "resumed from", "in the bucket", "steps\ndone", "lost", "notice to\ncommit", "startup",
)  # fmt: skip


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The columns' names and the cells. A column without a value is left out, as steps are without attempt records."""
    steps = any(row.last_step is not None for row in rows)
    lines = [_cells(row, steps) for row in rows]
    shown = [number for number in range(len(_COLUMNS)) if number < 2 or any(line[number] != "-" for line in lines)]
    return [_COLUMNS[number] for number in shown], [[line[number] for number in shown] for line in lines]


def _cells(row: Row, steps: bool) -> tuple[str, ...]:
    return (
        str(row.number),
        row.ended if steps else ended(row),
        "-" if steps else _seconds(row.after_s),
        row.resumed or "-",
        "-" if steps else row.there or "-",
        f"{row.first_step}-{row.last_step}" if row.last_step is not None else "-",
        "-" if row.lost_steps is None else str(row.lost_steps),
        _seconds(row.committed_s),
        _seconds(row.first_step_s),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def ended(row: Row) -> str:
    """How an attempt ended, and after a notice or SIGTERM, what it did until it left or was killed."""
    if row.kind not in faults.WARNED:
        return row.ended
    parts = [row.ended]
    if row.there is not None:
        late = row.last_write_s
        parts.append("nothing written since" if late is None else f"last write {late:.1f} s later")
    if row.exit_code is None:
        parts.append("then killed")
    elif f"exited with {row.exit_code}" not in row.ended:
        parts.append(f"exited with {row.exit_code}")
    return "; ".join(parts)


def done_again(rows: Sequence[Row]) -> str | None:
    """Sum up the time of a leg that was lost with its machines, and what was written again; None if not seen."""
    seen = [row for row in rows if row.there is not None]
    if not any(row.struck for row in seen):
        return None
    unsaved_s, again_s = (sum(getattr(row, name) or 0.0 for row in seen) for name in ("unsaved_s", "again_s"))
    files = sum(row.again_files or 0 for row in seen)
    again = f"{files} file{'s' if files > 1 else ''} ({again_s:.1f} s undisturbed)" if files else "none"
    return f"lost since the last save or start: {unsaved_s:.1f} s; checkpoints written again: {again}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The table as lines of text: `attempt 2: SIGTERM; after: 1.2 s; resumed from: save 3`."""
    columns, cells = table(rows)
    names = [" ".join(column.split()) for column in columns]
    return [
        "; ".join([f"attempt {line[0]}: {line[1]}", *(f"{n}: {c}" for n, c in zip(names[2:], line[2:], strict=True))])
        for line in cells
    ]
