"""When a run did what: each attempt's time in pieces, one after the other, by the same rules as its sums (times.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

from skyspot.money.attempts import Life, lives
from skyspot.money.clock import Clock, clock_of
from skyspot.money.report import Report
from skyspot.runs.records import AttemptRecords, Line, RunRecords, whole
from trainer.layout.events import number

MOST_CELLS = 1000
"""A timeline has no pieces shorter than this part of the run, unless they are few."""
_FEW = 50


class Piece(NamedTuple):
    """A stretch of time that went into one thing."""

    kind: str
    """A field of Times."""
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Band:
    """An attempt in a timeline. Times in seconds since the run began; waits and attempts follow each other."""

    number: int
    start_s: float
    """When its wait for a machine began."""
    end_s: float
    pieces: tuple[Piece, ...]
    """In order, without a gap; neighbours differ in kind."""
    steps: tuple[tuple[float, int], ...]
    """When each recorded step ended, and its number."""


def timeline_of(records: RunRecords, report: Report) -> tuple[Band, ...]:
    """The timeline of a run: a band for each attempt of its report."""
    bands: list[Band] = []
    at = 0.0
    for own, life, one in zip(records.attempts, lives(records.attempts), report.attempts, strict=True):
        cut = _Cut(at)
        cut.until(at + one.times.waiting, "waiting")
        steps = _attempt(cut, own, life, one.kept_until)
        bands.append(Band(one.number, at, cut.at, _joined(cut.pieces), tuple(steps)))
        at = cut.at
    return tuple(bands)


@dataclass
class _Cut:
    """Cuts a stretch of time into pieces, from its start to its end; what would go back is left out."""

    at: float
    end: float = math.inf
    pieces: list[Piece] = field(default_factory=list)

    def until(self, end_s: float, kind: str) -> None:
        end_s = min(end_s, self.end)
        if end_s > self.at:
            self.pieces.append(Piece(kind, self.at, end_s))
            self.at = end_s


def _joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The pieces, neighbours of the same kind as one."""
    found = []
    for kind, group in groupby(pieces, key=lambda piece: piece.kind):
        own = list(group)
        found.append(Piece(kind, own[0].start_s, own[-1].end_s))
    return tuple(found)


def _attempt(cut: _Cut, records: AttemptRecords, life: Life, kept_until: float) -> list[tuple[float, int]]:
    """Cut an attempt's time, which begins where the cut is; returns when its steps ended."""
    clock = clock_of(records)
    zero = cut.at + life.lead_s
    cut.end = cut.at + life.seconds
    placed = list(_placed(records, clock, zero))
    _set_up(cut, records, clock, zero, placed[0][0] if placed else cut.end)
    saved = {whole(event, "step") for event in records.events_named("saved")}
    before: Line | None = None
    ended: list[tuple[float, int]] = []
    for start, end, line in placed:
        waited_for_save = before is not None and before.step in saved and before.step < kept_until
        cut.until(start, "saving" if waited_for_save else "other")
        _line(cut, start, end, line, is_kept=line.step <= kept_until)
        before = line
        if line.is_step:
            ended.append((min(max(end, cut.at), cut.end), line.step))
    _ending(cut, records, life, clock, zero, [line for _, _, line in placed if line.is_step], kept_until)
    return ended


def _placed(records: AttemptRecords, clock: Clock, zero: float) -> Iterator[tuple[float, float, Line]]:
    """(start, end, line) of each step and evaluation; without times in its line, right after the one before."""
    first = clock.at(records.event("first-step"))
    at: float | None = None
    for line in records.lines:
        seconds = (line.step_s or 0.0) if line.is_step else line.eval_s
        ended = clock.ended(line)
        if ended is None and at is None:
            ended = first
        end = zero + ended if ended is not None else (zero if at is None else at) + seconds
        yield max(zero, end - seconds), end, line
        at = end


def _set_up(cut: _Cut, records: AttemptRecords, clock: Clock, zero: float, until: float) -> None:
    restored = clock.at(records.event("restored"))
    seconds = number(records.event("restored"), "seconds")
    if restored is not None and seconds:
        end = min(zero + restored, until)
        cut.until(end - seconds, "setup")
        cut.until(end, "restore")
    cut.until(until, "setup")


def _line(cut: _Cut, start: float, end: float, line: Line, *, is_kept: bool) -> None:
    """Cut a step into what it waited for and its own time, or an evaluation."""
    if not is_kept:
        cut.until(end, "lost")
    elif not line.is_step:
        cut.until(end, "evaluation")
    else:
        at = start
        for seconds, kind in ((line.save_s, "saving"), (line.data_s or 0.0, "data"), (line.eval_s, "evaluation")):
            at = min(at + seconds, end)
            cut.until(at, kind)
        cut.until(end, "productive")


def _ending(
    cut: _Cut, records: AttemptRecords, life: Life, clock: Clock, zero: float, steps: Sequence[Line], kept_until: float
) -> None:
    """Cut what follows the last line: steps that no line tells of, the last save, and the rest."""
    if steps and life.last_step is not None:
        known = max(steps[-1].step, life.restored_step or 0, min(kept_until, life.last_step))
        mean_s = sum(line.step_s or 0.0 for line in steps) / len(steps)
        cut.until(cut.at + max(0.0, life.last_step - known) * mean_s, "lost")
        saved = clock.at(records.event("saved")) if records.event("saved") else None
        if records.event("end") and saved is not None:
            begun = clock.at(records.event("save-begin")) if records.event("save-begin") else None
            cut.until(zero + begun if begun is not None else cut.at, "other")
            cut.until(zero + saved, "saving")
    cut.until(cut.end, "other" if steps else "setup")


def coarse(band: Band, seconds_per_cell: float) -> Band:
    """A band whose pieces are no shorter than a cell; the same if they are few."""
    if len(band.pieces) <= _FEW:
        return band
    count = max(1, math.ceil((band.end_s - band.start_s) / seconds_per_cell))
    if count >= len(band.pieces):
        return band
    ends = [band.start_s + at * seconds_per_cell for at in range(1, count)] + [band.end_s]
    kinds = cells(band.pieces, band.start_s, seconds_per_cell, count)
    starts = [band.start_s, *ends]
    return replace(band, pieces=_joined(Piece(kind, *span) for kind, *span in zip(kinds, starts, ends, strict=False)))


def to_json(bands: Sequence[Band]) -> list[dict[str, Any]]:
    """A timeline as JSON; seconds since the run began."""
    finest = (bands[-1].end_s if bands else 0.0) / MOST_CELLS
    return [
        {"attempt": band.number, "start_s": band.start_s, "end_s": band.end_s, "pieces": coarse(band, finest).pieces}
        for band in bands
    ]


def cells(pieces: Sequence[Piece], start_s: float, seconds_per_cell: float, count: int) -> list[str]:
    """What took most of each cell of a timeline; lost steps show wherever there are any. Empty: nothing.

    Args:
        pieces: In order.
        start_s: Where the first cell begins.
        seconds_per_cell: How long each is.
        count: How many there are.
    """
    shares: list[dict[str, float]] = [{} for _ in range(count)]
    for piece in pieces:
        first = int((piece.start_s - start_s) / seconds_per_cell)
        last = min(count - 1, math.ceil((piece.end_s - start_s) / seconds_per_cell) - 1)
        for at in range(max(0, first), last + 1):
            begin = start_s + at * seconds_per_cell
            share = min(piece.end_s, begin + seconds_per_cell) - max(piece.start_s, begin)
            shares[at][piece.kind] = shares[at].get(piece.kind, 0.0) + share
    return ["lost" if "lost" in one else max(one, key=lambda kind: one[kind], default="") for one in shares]
