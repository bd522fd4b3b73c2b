"""The logs of two runs, compared step by step: what differs first there, and which cause that tells of."""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from skyspot.rehearsal import naming, remedies
from skyspot.rehearsal.remedies import Cause
from skyspot.rehearsal.watch import walk

LARGEST = 20_000_000
"""A log with more bytes is not read."""
REPEATED = 3
"""So many steps, at most, must repeat those of the start."""
_PAIR = re.compile(r"([A-Za-z_][\w./-]*)['\"]?\s*[=: ]\s*\[?(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?!\w|[:.]\d)")
_STEP = re.compile(r"(global_?|train_?)?(step|iter|iteration|update|round)s?", re.IGNORECASE)
_EPOCH = re.compile(r"epochs?", re.IGNORECASE)
_TABLES = {".csv": ",", ".tsv": "\t"}
_TEXTS = {".txt", *_TABLES}
_RATE = re.compile(r"(^|[^a-z])(lr|learning_?rate)([^a-z]|$)", re.IGNORECASE)
_ORDER = re.compile(r"sample|order|index|indices|shuffle", re.IGNORECASE)
_NORM = re.compile(r"norm|grad", re.IGNORECASE)
_SCORE = re.compile(r"loss|acc|error|score|reward|return", re.IGNORECASE)
CLOCK = re.compile(
    r"time|elapsed|sec|dur|eta$|speed|throughput|per_|/s$|date|mem|(^|_)(s|ms|pid|host|rank)$", re.IGNORECASE
)

Value = float | str
Facts = dict[str, Value]
Place = tuple[tuple[str, int], ...]
"""Where a line belongs: `step` 40; `epoch` 3, `step` 40."""
Lines = dict[Place, Facts]
"""What is logged at each place."""


@dataclass(frozen=True)
class _Log:
    """The logs of one kind."""

    path: str
    """That of the newest."""
    rows: list[Facts]
    """Their lines, the oldest first."""


def cause(reference: Path, other: Path) -> Cause | None:
    """Name the likeliest cause of a difference between two runs, from their logs; None if these tell nothing.

    Args:
        reference: The undisturbed run's bucket.
        other: The preempted run's.
    """
    found = []
    left, right = _read(reference), _read(other)
    for kind in sorted(left.keys() & right.keys()):
        counters = _counters(left[kind].rows)
        ours, theirs = _lines(left[kind].rows, counters), _lines(right[kind].rows, counters)
        step, keys = _first_difference(ours, theirs)
        if step is not None:
            found.append((step, kind, _describe(ours, theirs, step, keys, right[kind].path)))
    return min(found)[2] if found else None


def first_place(output: Path) -> str:
    """The first step, or epoch, that an attempt printed: `epoch 3, step 40`; empty if it printed none."""
    with output.open(errors="replace") as file:
        for line in file.read(LARGEST).splitlines():
            numbers = ((word, _number(_facts(line), counter)) for word, counter in (("epoch", _EPOCH), ("step", _STEP)))
            if place := tuple((word, number) for word, number in numbers if number is not None):
                return _said(place)
    return ""


def _counters(rows: Sequence[Facts]) -> tuple[re.Pattern[str], ...]:
    """What the lines of an undisturbed run are counted by: steps; if these begin again, epochs and steps; or epochs."""
    if all(_number(row, _STEP) is None for row in rows):
        return (_EPOCH,)
    steps = [_number(row, _STEP) or 0 for row in rows if _number(row, _EPOCH) is not None]
    return (_EPOCH, _STEP) if any(after < before for before, after in pairwise(steps)) else (_STEP,)


def _first_difference(left: Lines, right: Lines) -> tuple[Place | None, list[str]]:
    """The first step that is logged differently, and the keys that differ there; those of the clock do not count."""
    steps = sorted(left.keys() & right.keys())
    for step in steps:
        common = [key for key in left[step] if key in right[step] and not CLOCK.search(key)]
        keys = [key for key in common if left[step][key] != right[step][key]]
        if keys:
            # What differs in the first step of all differs by itself.
            return (None, []) if step == steps[0] else (step, keys)
    return None, []


def _describe(left: Lines, right: Lines, step: Place, keys: list[str], path: str) -> Cause:
    rate = next((key for key in keys if _RATE.search(key)), None)
    again = next((key for key in keys if _repeats(left, right, step, key)), None)
    order = next((key for key in keys if _ORDER.search(key)), None) or again
    # A score differs because something else does: a scale, a temperature.
    first = next((key for key in keys if not _SCORE.search(key) and not _NORM.search(key)), keys[0])
    key = rate or order or first
    what = "the LR: " if rate else "the data order: " if order else ""
    finding = remedies.LEARNING_RATE if rate else remedies.DATA_ORDER if order else remedies.NO_CAUSE
    if not rate and again and _SCORE.search(again):
        key, what, finding = again, "what it read was not used: ", remedies.NOT_USED
    if key == again:
        repeated = f"{what}from {_said(step)} on, {key} in {path} is what it was from {_said(min(left))} on"
        return Cause(repeated, finding)
    values = f"{left[step][key]} undisturbed, {right[step][key]} preempted"
    return Cause(f"{what}from {_said(step)} on, {key} in {path} differs ({values})", finding)


def _said(place: Place) -> str:
    return ", ".join(f"{word} {number}" for word, number in place)


def _repeats(left: Lines, right: Lines, step: Place, key: str) -> bool:
    """True if a run logs from a step on what the undisturbed run logged at its start."""
    first = sorted(left)[:REPEATED]
    after = sorted(number for number in right if number >= step)[: len(first)]
    pairs = [(left[one].get(key), right[two].get(key)) for one, two in zip(first, after, strict=False)]
    return len(pairs) == len(first) and all(one == two for one, two in pairs) and len({one for one, _ in pairs}) > 1


def _read(bucket: Path) -> dict[str, _Log]:
    """Read the logs, by the kind of their path."""
    files = [Path(path) for path, size in walk(bucket) if size <= LARGEST]
    found: dict[str, _Log] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name)):
        path = file.relative_to(bucket).as_posix()
        suffix = file.suffix.lower()
        if naming.looks_like_log(path) or suffix in _TEXTS:
            lines = file.read_text(errors="replace").splitlines()
            separator = _TABLES.get(suffix)
            rows = list(_rows(lines, separator) if separator else map(_facts, lines))
            kind = naming.parse(path).kind
            found[kind] = _Log(path, [*(found[kind].rows if kind in found else ()), *rows])
    return found


def _lines(rows: Iterable[Facts], counters: Sequence[re.Pattern[str]]) -> Lines:
    """The rows by their place; of one place, the latest count."""
    found: Lines = {}
    for row in rows:
        numbers = [_number(row, counter) for counter in counters]
        place = tuple(
            ("epoch" if counter is _EPOCH else "step", number)
            for counter, number in zip(counters, numbers, strict=True)
            if number is not None
        )
        if len(place) == len(counters) < len(row):
            found.setdefault(place, {}).update(row)
    return found


def _number(row: Facts, counter: re.Pattern[str]) -> int | None:
    """What a line says of a counter; None if it does not."""
    for key, value in row.items():
        if counter.fullmatch(key) and isinstance(value, float) and math.isfinite(value):
            return int(value)
    return None


def _rows(lines: Iterable[str], separator: str) -> Iterator[Facts]:
    """The names and values in each row of a table with a header. Cells without a value are left out."""
    header: list[str] = []
    with suppress(csv.Error):  # One cell has more than 131,072 characters.
        for cells in csv.reader((line.replace("\0", "") for line in lines), delimiter=separator):
            header = header or cells
            yield {key.strip(): _cell(cell) for key, cell in zip(header, cells, strict=False) if cell.strip()}


def _cell(text: str) -> Value:
    try:
        return float(text)
    except ValueError:
        return text


def _facts(text: str) -> Facts:
    """The names and values in a line of JSON, of a Python dict, or of text like `step 3 loss=0.25`."""
    if text.startswith("{"):
        try:
            found = ast.literal_eval(text) if text.startswith("{'") else json.loads(text)
            return {
                str(key): value if isinstance(value, str) else float(value)
                for key, value in found.items()
                if isinstance(value, str | int | float)
            }
        except (ValueError, SyntaxError, RecursionError, MemoryError, OverflowError, AttributeError):
            return {}
    return {key: float(value) for key, value in _PAIR.findall(text[:2000])}
