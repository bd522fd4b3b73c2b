"""Loss and learning rate over a run's steps, thinned to what a plot can show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from skyspot.money.report import Report
from skyspot.runs.records import RunRecords

MOST_POINTS = 400
"""Points of a curve; a run has more steps than a plot has pixels."""
_LARGEST = 1e30
"""What is larger says nothing in a plot."""


class Point(NamedTuple):
    """One step, or the mean of several that follow each other."""

    step: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A value over the steps of a run."""

    points: tuple[Point, ...]
    steps_per_point: int
    without: int
    """Steps without a value: it is not recorded, or it is not finite."""


@dataclass(frozen=True)
class Curves:
    """What a run's training looks like."""

    loss: Curve
    lr: Curve
    lost: tuple[tuple[Point, ...], ...]
    """The losses of lost steps, by attempt."""
    resumes: tuple[int, ...]
    """The steps after which an attempt resumed."""


def curves_of(records: RunRecords, report: Report) -> Curves:
    """The curves of a run; those of loss and learning rate are of the preserved steps."""
    kept, lost = [], []
    for own, one in zip(records.attempts, report.attempts, strict=True):
        steps = [line for line in own.lines if line.is_step]
        kept += [line for line in steps if line.step <= one.kept_until]
        dropped = [(line.step, line.loss) for line in steps if line.step > one.kept_until]
        if (curve := _curve(dropped)).points:
            lost.append(curve.points)
    kept.sort(key=lambda line: line.step)
    return Curves(
        loss=_curve([(line.step, line.loss) for line in kept]),
        lr=_curve([(line.step, line.lr) for line in kept]),
        lost=tuple(lost),
        resumes=tuple(sorted({one.restored_step for one in report.attempts if one.restored_step})),
    )


def _curve(values: Sequence[tuple[int, float | None]]) -> Curve:
    known = [(step, value) for step, value in values if value is not None and abs(value) <= _LARGEST]
    return Curve(tuple(thinned(known)), _per_point(len(known)), len(values) - len(known))


def _per_point(count: int) -> int:
    return max(1, math.ceil(count / MOST_POINTS))


def thinned(values: Sequence[tuple[int, float]]) -> Iterable[Point]:
    """At most MOST_POINTS points, each the mean of as many neighbours, with their least and largest value."""
    size = _per_point(len(values))
    for at in range(0, len(values), size):
        group = values[at : at + size]
        own = [value for _, value in group]
        mean = statistics.fmean(own) if size > 1 else own[0]
        yield Point(statistics.fmean(step for step, _ in group), mean, min(own), max(own))
