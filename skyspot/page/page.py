"""The page of a report: plain data into a template; whatever a record says is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from skyspot import __version__
from skyspot.errors import SkyspotError
from skyspot.money import sentences
from skyspot.money.attempts import RUNNING
from skyspot.money.report import Report
from skyspot.money.sentences import NAMES, parts
from skyspot.money.timeline import Band, coarse, timeline_of
from skyspot.page import plots, words
from skyspot.page.costs import USD, Costs, costs_of
from skyspot.page.curves import Curves, curves_of
from skyspot.page.words import About
from skyspot.runs.records import RunRecords
from skyspot.wording import duration, figure, many, printable

KINDS = ("waiting", "setup", "restore", "productive", "data", "evaluation", "saving", "lost", "other")
"""Fields of Times, as a timeline shows them."""
MOST_PIECES = 1500
"""A timeline has no piece shorter than this part of the run: it would not be seen."""
_MOST_ROWS = 20
"""Rows of a table beside a plot."""


class NoPlotsError(SkyspotError):
    """matplotlib is not installed."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A plot with its words, its legend ((colour, text) pairs) and its numbers."""

    id: str
    about: About
    drawings: Sequence[tuple[str, str]]
    """(class, SVG)."""
    legend: Sequence[tuple[str, str]]
    numbers: Table | None


def check_plots() -> None:
    """Check that plots can be drawn.

    Raises:
        NoPlotsError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise NoPlotsError("the page's plots need matplotlib, which is not installed: pip install 'skyspot[report]'")


def page(report: Report, records: RunRecords, now: float) -> str:
    """A run's report as an HTML document: one file, which needs no network and runs no script.

    Args:
        report: The report.
        records: What it was made from.
        now: Unix seconds.

    Raises:
        NoPlotsError: matplotlib is not installed.
    """
    check_plots()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    environment.filters["duration"] = duration
    return environment.get_template("page.html.j2").render(
        css=(folder / "page.css").read_text(encoding="utf-8"),
        version=__version__,
        written=datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **_content(report, records),
    )


def _shown(value: Any) -> Any:
    """Texts without control characters; markup is left as it is."""
    return printable(value) if type(value) is str else value


def _content(report: Report, records: RunRecords) -> dict[str, Any]:
    bands = [coarse(band, max(1.0, report.times.total) / MOST_PIECES) for band in timeline_of(records, report)]
    rows = [sentences.cells(one) for one in report.attempts]
    columns = sentences.shown_columns(rows)
    return {
        "name": report.root.rstrip("/").rpartition("/")[2] or report.root,
        "root": report.root,
        "state": sentences.state(report),
        "is_running": report.state == RUNNING,
        "quote": sentences.saving(report.spend) or _no_saving(report),
        "tiles": _tiles(report),
        "plots": [
            _timeline(bands, report), *_loss(curves_of(records, report)), *_steps(bands, report),
            *_cost(costs_of(bands, report), bands, report),
        ],
        "parts": [(name, NAMES[name], seconds / report.times.total, seconds) for name, seconds in parts(report.times)],
        "attempts": Table("The attempts", [name or "attempt" for name in columns],
                          [[row[name] for name in columns] for row in rows]),
        "summary": sentences.summary(report),
        "notes": sentences.notes(report),
    }  # fmt: skip


def _no_saving(report: Report) -> str:
    if report.spend.usd is None:
        return "What this run saved is not known: no price is recorded. `--prices SPOT,ONDEMAND` states one."
    if report.spend.unpriced_attempts:
        return f"What this run saved is not known: {many(report.spend.unpriced_attempts, 'attempt')} without a price."
    so_far = "" if report.state == "finished" else " so far"
    return f"This run cost USD {report.spend.usd:,.2f}{so_far}; what it saved is not known."


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(name, figure, what it is of) of the figures at the top."""
    spend, tiles = report.spend, []
    if report.goodput is not None:
        took = f"{duration(report.times.productive)} of {duration(report.times.total)}"
        tiles.append(("Goodput", f"{report.goodput:.1%}", took))
        done = sum(one.steps or 0 for one in report.attempts)
        lost = f"{'≥ ' if report.is_lost_at_least else ''}{report.lost_steps:,}"
        lost = lost if sentences.knows_lost_steps(report) else "not known"
        tiles.append(("Lost steps", lost, f"of {done:,} done"))
    else:
        tiles.append(("Time", duration(report.times.total), "waits included"))
    tiles.append(("Preemptions", str(report.preemptions), f"in {many(len(report.attempts), 'attempt')}"))
    spent = "no price is known" if spend.usd is None else f"USD {spend.usd:,.2f}"
    hours = sentences.node_hours(spend.node_hours)
    tiles.append(("Spend", spent, hours) if spend.usd is not None else ("Node time", hours, spent))
    if spend.on_demand_usd is not None and spend.on_demand_node_hours is not None:
        needed = sentences.node_hours(spend.on_demand_node_hours)
        tiles.append(("On demand", f"USD {spend.on_demand_usd:,.2f}", needed))
    return tiles


# -- the plots with their numbers --------------------------------------------------------------------------------------


def _timeline(bands: Sequence[Band], report: Report) -> Plot:
    shown = {name for name, _ in parts(report.times)}
    kinds = [kind for kind in KINDS if kind in shown]
    about, titles = words.of_timeline(report), words.tips(bands, report) if len(bands) <= words.MOST_BARS else {}
    rows = [
        [str(one.number), *(duration(getattr(one.times, kind)) if getattr(one.times, kind) else "-" for kind in kinds)]
        for one in report.attempts
    ]
    return Plot(
        id="timeline",
        about=about,
        drawings=[
            (name, plots.timeline(bands, kinds, titles, about, wide=name == "wide")) for name in ("wide", "narrow")
        ],
        legend=[(kind, NAMES[kind]) for kind in kinds],
        numbers=Table("Time of each attempt", ["attempt", *(NAMES[kind] for kind in kinds)], rows),
    )


def _steps(bands: Sequence[Band], report: Report) -> list[Plot]:
    if not any(band.steps for band in bands):
        return []
    about = words.of_steps(report)
    legend = [("productive", "preserved steps"), *([("lost", "lost steps")] if report.lost_steps else [])]
    rows = [
        [str(one.number), _number(one.restored_step), _number(one.last_step), _number(one.lost_steps),
         duration(one.times.lost)]
        for one in report.attempts
    ]  # fmt: skip
    numbers = Table("Steps of each attempt", ["attempt", "resumed after step", "last step", "lost", "time lost"], rows)
    return [Plot("steps", about, [("", plots.steps(bands, report, about))], legend, numbers)]


def _loss(curves: Curves) -> list[Plot]:
    points = curves.loss.points
    if not points and not curves.lost:
        return []
    about = words.of_loss(curves)
    legend = [("loss", "loss"), *([("rate", "learning rate")] if curves.lr.points else [])]
    legend += [("lost", "lost steps")] if curves.lost else []
    stride = -(-len(points) // _MOST_ROWS) or 1
    rates = {round(one.step): one.mean for one in curves.lr.points}
    shown = [*points[::stride], *(points[-1:] if (len(points) - 1) % stride else [])]
    rows = [[f"{one.step:,.0f}", f"{one.mean:.6g}", _rate(rates.get(round(one.step)))] for one in shown]
    numbers = Table("Loss by step", ["step", "loss", "learning rate"], rows) if rows else None
    drawings = [(name, plots.loss(curves, about, wide=name == "wide")) for name in ("wide", "narrow")]
    return [Plot("loss", about, drawings, legend, numbers)]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _cost(costs: Costs, bands: Sequence[Band], report: Report) -> list[Plot]:
    if not costs.spent[-1][1]:
        return []
    about = words.of_cost(costs, report)
    legend = [("spent", "this run"), *([("demand", "on demand, undisturbed")] if costs.on_demand else [])]
    shown = (lambda cost: f"{cost:,.2f}") if costs.unit == USD else figure
    rows = [
        [str(band.number), duration(end), shown(value)]
        for band, (end, value) in zip(bands, costs.spent[2::2], strict=True)
    ]
    if costs.on_demand:
        rows.append(["on demand", duration(costs.on_demand[-1][0]), shown(costs.on_demand[-1][1])])
    numbers = Table("Cost until the end of each attempt", ["attempt", "until", costs.unit], rows)
    return [Plot("cost", about, [("", plots.cost(costs, report.times.total, about))], legend, numbers)]
