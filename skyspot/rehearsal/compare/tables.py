"""Comparing CSV and TSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

from skyspot.rehearsal.compare.difference import MISSING, Difference, excerpts
from skyspot.rehearsal.compare.rules import Comparison, Findings, FormatError, dotted, is_close


def compare_tables(left: Path, right: Path, rules: Comparison, findings: Findings) -> Difference | None:
    """Compare two tables row by row. A first row that is not all numbers names the columns.

    Raises:
        FormatError: a file is no CSV.
    """
    try:
        with ExitStack() as stack:
            one, two = (_rows(path, stack) for path in (left, right))
            columns: list[_Columns] | None = None
            for number, (before, after) in enumerate(zip_longest(one, two), 1):
                if before is None or after is None:
                    shown = [MISSING if row is None else excerpts(",".join(row), "")[0] for row in (before, after)]
                    return Difference(f"row {number}", *shown)
                if columns is None:
                    columns = [_Columns(row, rules, findings) for row in (before, after)]
                found = _compare_rows(number, before, after, columns, rules, findings)
                if found:
                    return found
    except (csv.Error, UnicodeDecodeError):
        raise FormatError("no CSV in UTF-8") from None
    return None


class _Columns:
    """The columns of a table that are compared."""

    def __init__(self, first: Sequence[str], rules: Comparison, findings: Findings) -> None:
        named = any(_number(cell) is None for cell in first)
        self.names = list(first) if named else []
        self.dropped = {n for n, name in enumerate(self.names) if findings.ignores([name], rules)}

    def kept(self, row: Sequence[str]) -> list[str]:
        return [cell for n, cell in enumerate(row) if n not in self.dropped]


def _compare_rows(
    number: int,
    before: Sequence[str],
    after: Sequence[str],
    columns: Sequence[_Columns],
    rules: Comparison,
    findings: Findings,
) -> Difference | None:
    one, two = columns[0].kept(before), columns[1].kept(after)
    if one == two:
        return None
    names = columns[0].kept(columns[0].names)
    for n, (left, right) in enumerate(zip_longest(one, two)):
        name = f"column {dotted([names[n]]) if n < len(names) and names[n] and number > 1 else n + 1}"
        if left is None or right is None:
            shown = [MISSING if cell is None else excerpts(cell, "")[0] for cell in (left, right)]
            return Difference(f"row {number}, {name}", *shown)
        if left == right:
            continue
        values = _number(left), _number(right)
        if rules.tolerance is None or None in values or not is_close(*values, rules.tolerance):  # type: ignore[arg-type]
            return Difference(f"row {number}, {name}", *excerpts(left, right))
        if values[0] == values[0]:
            findings.record(abs(values[0] - values[1]), name)  # type: ignore[operator]
    return None


def _rows(path: Path, stack: ExitStack) -> Iterator[list[str]]:
    file = stack.enter_context(path.open(encoding="utf-8-sig", newline=""))
    first = file.readline(1 << 16)
    file.seek(0)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in first and "," not in first else ","
    return csv.reader(file, delimiter=delimiter)


def _number(cell: str) -> float | None:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return None
