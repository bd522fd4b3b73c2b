"""The plots of a page, drawn by matplotlib. The page's CSS has their colours; so they follow light and dark."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from skyspot.money.report import Report
from skyspot.money.timeline import Band, Piece
from skyspot.page.costs import Costs
from skyspot.page.curves import Curves, Point
from skyspot.page.svg import inline
from skyspot.page.words import MOST_BARS, ROWS, About

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NARROW, WIDE = 400, 1000
"""Widths in points: beside another plot, or on a phone; and over a whole screen."""
_NAMES = (
    "ink", "muted", "grid", "page", "productive", "setup", "restore", "saving", "lost", "waiting", "evaluation", "data",
    "other", "loss", "spread", "rate", "spent", "demand",
)  # fmt: skip
_INK = {name: f"#0101{number:02x}" for number, name in enumerate(_NAMES, 1)}
"""A colour that stands for each of the page's."""
_COLOURS = {colour: f"var(--{name})" for name, colour in _INK.items()}
_MOST_STEPS = 1500
"""Points of the plot of steps over time."""
_UNITS = ((4 * 86400, 86400, "days"), (7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
_LOG_FROM = 20
"""A loss that falls by such a factor is drawn on a logarithmic axis."""


@contextmanager
def _style() -> Iterator[None]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It tells of its caches.
    import matplotlib as mpl

    ink, muted = _INK["ink"], _INK["muted"]
    with mpl.rc_context():
        mpl.rcdefaults()  # Not what a file of the user's says.
        mpl.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": "skyspot", "text.parse_math": False, "font.size": 11,
            "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": muted, "axes.labelcolor": muted,
            "xtick.color": muted, "ytick.color": muted, "text.color": ink, "axes.grid": True,
            "grid.color": _INK["grid"], "grid.linewidth": 0.8, "axes.axisbelow": True,
            "figure.constrained_layout.use": True, "lines.solid_capstyle": "round", "hatch.linewidth": 1.2,
        })  # fmt: skip
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


def _drawn(figure: Figure, name: str, about: About, titles: Mapping[str, str] | None = None) -> str:
    file = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return inline(file.getvalue(), name, _COLOURS, about.title, about.text, titles or {})


def _unit(seconds: float) -> tuple[float, str]:
    """The seconds of the unit that suits a time, and its name."""
    return next((unit, name) for least, unit, name in _UNITS if seconds >= least)


def _elapsed(axes: Axes, seconds: float) -> float:
    """Name the axis of time; returns the seconds of its unit."""
    unit, name = _unit(seconds)
    axes.set_xlabel(f"{name} since the run began")
    axes.set_xlim(0, max(seconds, 1.0) / unit)
    return unit


# -- the plots ---------------------------------------------------------------------------------------------------------


def timeline(
    bands: Sequence[Band], kinds: Sequence[str], titles: Mapping[str, str], about: About, *, wide: bool
) -> str:
    """A bar for each attempt, its pieces coloured by kind; of many attempts, the whole run in rows.

    Args:
        bands: Of the attempts, thinned.
        kinds: Those to draw, in order.
        titles: What a pointer shows over an attempt's pieces of a kind, by `attempt-NUMBER-KIND`.
        about: The plot in words.
        wide: For a screen, not a phone.
    """
    with _style():
        shown = bands if len(bands) <= MOST_BARS else folded(bands)
        figure = _figure(WIDE if wide else NARROW, 55 + 20 * len(shown))
        axes = figure.add_subplot()
        of_run, before = _unit(bands[-1].end_s)
        unit, name = _unit(shown[-1].end_s)
        axes.set_xlabel(f"{name} since the {'run' if shown is bands else 'row'} began")
        axes.set_xlim(0, max(shown[-1].end_s, 1.0) / unit)
        for band in shown:
            for kind in kinds:
                _bars(axes, band, kind, unit, f"attempt-{band.number}-{kind}")
        axes.set_ylim(shown[-1].number + 0.6, shown[0].number - 0.6)
        axes.grid(visible=False, axis="y")
        axes.set_ylabel("attempt" if shown is bands else f"{before} before")
        labels = [
            str(band.number) if shown is bands else f"{at * band.end_s / of_run:.3g}" for at, band in enumerate(shown)
        ]
        axes.set_yticks([band.number for band in shown], labels)
        axes.tick_params(axis="y", length=0)
        return _drawn(figure, f"timeline-{'wide' if wide else 'narrow'}", about, titles)


def folded(bands: Sequence[Band]) -> list[Band]:
    """The whole run in rows of the same length, as bands that each begin at 0."""
    length = bands[-1].end_s / ROWS
    rows: list[list[Piece]] = [[] for _ in range(ROWS)]
    for piece in (piece for band in bands for piece in band.pieces):
        first, last = (min(ROWS - 1, int(at / length)) for at in (piece.start_s, piece.end_s))
        for row in range(first, last + 1):
            start, end = max(piece.start_s - row * length, 0.0), min(piece.end_s - row * length, length)
            if end > start:
                rows[row].append(Piece(piece.kind, start, end))
    return [Band(number, 0.0, length, tuple(pieces), ()) for number, pieces in enumerate(rows, 1)]


def _bars(axes: Axes, band: Band, kind: str, unit: float, name: str) -> None:
    """The pieces of a kind, as one drawing."""
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    low, high = band.number - 0.4, band.number + 0.4
    corners = [
        [(one.start_s / unit, low), (one.start_s / unit, high), (one.end_s / unit, high), (one.end_s / unit, low)]
        for one in band.pieces
        if one.kind == kind
    ]
    if corners:
        path = Path.make_compound_path_from_polys(np.array(corners))
        bars = axes.add_patch(PathPatch(path, facecolor=_INK[kind], linewidth=0, gid=name))
        if kind == "lost":
            bars.set(hatch="////", edgecolor=_INK["page"])


def steps(bands: Sequence[Band], report: Report, about: About) -> str:
    """The step over time, a line for each attempt; below it, the time that each attempt lost, at its end."""
    with _style():
        figure, (top, *below) = _rows(NARROW, report.times.lost > 0)
        unit = _elapsed(top, bands[-1].end_s)
        most = max(20, _MOST_STEPS // len(bands))
        jumps, fine, lost = [], [], []
        last: list[tuple[float, int]] = []
        for band, one in zip(bands, report.attempts, strict=True):
            if band.steps and one.restored_step is not None:
                kept = (one.last_step or 0) - (one.lost_steps or 0)
                start = next(
                    (piece.end_s for piece in reversed(band.pieces) if piece.kind in ("restore", "setup")), 0.0
                )
                line = [(min(start, band.steps[0][0]), one.restored_step), *band.steps]
                jumps.append([*last, line[0]])
                fine.append(_every([at for at in line if at[1] <= kept], most))
                dropped = _every([at for at in line if at[1] > kept], most)
                lost.append([*fine[-1][-1:], *dropped] if dropped else [])
                last = line[-1:]
        _lines(top, jumps, unit, color=_INK["muted"], linewidth=0.8, linestyle=":")
        _lines(top, fine, unit, color=_INK["productive"], linewidth=2)
        _lines(top, lost, unit, color=_INK["lost"], linewidth=2)
        top.set_ylim(bottom=0)
        top.set_ylabel("step")
        _counts(top.yaxis)
        for axes in below:
            _lost(axes, bands, report, unit)
            axes.set_xlabel(top.get_xlabel())
            top.set_xlabel("")
        figure.align_ylabels([top, *below])
        return _drawn(figure, "steps", about)


def _lines(axes: Axes, lines: Sequence[Sequence[tuple[float, float]]], unit: float = 1.0, **style: Any) -> None:
    """Lines of (x * unit, y), as one drawing."""
    points = [point for line in lines if line for point in (*line, (math.nan, math.nan))]
    axes.plot([x / unit for x, _ in points], [y for _, y in points], **style)


def _lost(axes: Axes, bands: Sequence[Band], report: Report, unit: float) -> None:
    """A bar for the time that each attempt lost, at its end."""
    size, name = _unit(max(one.times.lost for one in report.attempts))
    ends = [band.end_s / unit for band, one in zip(bands, report.attempts, strict=True) if one.times.lost]
    values = [one.times.lost / size for one in report.attempts if one.times.lost]
    axes.bar(ends, values, width=bands[-1].end_s / unit / 60, align="center", color=_INK["lost"], hatch="////",
             edgecolor=_INK["page"], linewidth=0)  # fmt: skip
    axes.set_ylabel(f"lost {name}")
    axes.set_ylim(bottom=0)


def _rows(width: float, is_two: bool) -> tuple[Figure, list[Axes]]:
    """A figure with a plot, and where there is more to show, a lower one below it on the same axis."""
    figure = _figure(width, 290 if is_two else 230)
    heights = (3, 1) if is_two else (1,)
    return figure, list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])


def _every(line: list[tuple[float, int]], most: int) -> list[tuple[float, int]]:
    stride = -(-len(line) // most) or 1
    return [*line[::stride], *line[-1:]]


def _counts(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter("{x:,.0f}")


def loss(curves: Curves, about: About, *, wide: bool) -> str:
    """The loss of the preserved steps with its spread, that of lost steps, the learning rate, and where it resumed."""
    from matplotlib.ticker import LogFormatter, MaxNLocator

    with _style():
        figure, (top, *below) = _rows(WIDE if wide else NARROW, bool(curves.lr.points))
        points = curves.loss.points
        if curves.loss.steps_per_point > 1:
            top.fill_between([one.step for one in points], [one.low for one in points], [one.high for one in points],
                             facecolor=_INK["spread"], linewidth=0)  # fmt: skip
        _curve(top, points, "loss")
        _lines(top, [[(one.step, one.mean) for one in dropped] for dropped in curves.lost], color=_INK["lost"])
        lows = [one.low for one in points]
        if lows and min(lows) > 0 and max(one.high for one in points) / min(lows) > _LOG_FROM:
            top.set_yscale("log")
            top.yaxis.set_major_formatter(LogFormatter())
            top.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        top.set_ylabel("loss")
        for axes in below:
            _curve(axes, curves.lr.points, "rate")
            axes.set_ylabel("LR")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_locator(MaxNLocator(3))
        for axes in (top, *below):
            axes.vlines([step + 0.5 for step in curves.resumes], 0, 1, transform=axes.get_xaxis_transform(),
                        color=_INK["muted"], linewidth=0.8, linestyle=(0, (3, 2)))  # fmt: skip
        axes = [top, *below][-1]
        axes.set_xlabel("step")
        _counts(axes.xaxis)
        figure.align_ylabels([top, *below])
        return _drawn(figure, f"loss-{'wide' if wide else 'narrow'}", about)


def _curve(axes: Axes, points: Sequence[Point], name: str) -> None:
    marker = "o" if len(points) == 1 else ""
    steps, means = [one.step for one in points], [one.mean for one in points]
    axes.plot(steps, means, color=_INK[name], linewidth=1.6, marker=marker, markersize=3)


def cost(costs: Costs, seconds: float, about: About) -> str:
    """What the run has cost over time, beside what the same steps cost on demand."""
    with _style():
        figure = _figure(NARROW, 250)
        axes = figure.add_subplot()
        unit = _elapsed(axes, seconds)
        most = max(line[-1][1] for line in (costs.spent, costs.on_demand) if line)
        for line, name, style in ((costs.on_demand, "demand", (0, (5, 2))), (costs.spent, "spent", "-")):
            if not line:
                continue
            axes.plot([at / unit for at, _ in line], [value for _, value in line], color=_INK[name], linewidth=2,
                      linestyle=style)  # fmt: skip
            end, value = line[-1][0] / unit, line[-1][1]
            axes.plot(end, value, "o", color=_INK[name], markersize=5, clip_on=False)
            side = 1 if line[-1][0] < 0.3 * seconds else -1
            axes.annotate(
                f"{value:,.2f}", (end, value), (8 * side, 0 if value == most else -9), textcoords="offset points",
                ha="left" if side > 0 else "right", va="center" if value == most else "top", color=_INK["ink"],
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_ylabel(costs.unit)
        return _drawn(figure, "cost", about)
