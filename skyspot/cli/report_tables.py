"""A run's report as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import groupby

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyspot.cli.format import duration, many, printable
from skyspot.money.attempts import NOTICE, RUNNING, SIGNAL, Place
from skyspot.money.hindsight import Interval
from skyspot.money.report import AttemptReport, Report
from skyspot.money.spend import Spend
from skyspot.money.times import Times
from skyspot.money.waiting import SKYPILOT

_NAMES = {
    "setup": "set-up", "restore": "restore", "saving": "saving", "lost": "lost steps",
    "waiting": "waiting for a machine", "evaluation": "evaluation", "data": "data", "other": "other",
}  # fmt: skip
"""What Times are called; without the productive time."""
MAX_NOTES = 12
_REST, _WIDTH = "The rest", 12


def show(report: Report) -> None:
    """Print a report."""
    click.echo(printable(_headline(report)))
    _print(_table(report.attempts))
    width = Console().width
    for name, text in _summary(report):
        click.echo(_wrapped(name, printable(text), width))
    notes = [*_waits(report.attempts), *report.notes]
    for note in notes[:MAX_NOTES]:
        click.echo(f"Note: {printable(note)}")
    if len(notes) > MAX_NOTES:
        click.echo(f"Note: {len(notes) - MAX_NOTES} more; --json has all.")


def _wrapped(name: str, text: str, width: int) -> str:
    """A line of the summary, broken between its parts where there are several."""
    indent = " " * (_WIDTH + 1)
    lines = [f"{name:<{_WIDTH}} "]
    for part in text.split("; ") if name != _REST else text.split(", "):
        joint = "" if len(lines[-1]) <= len(indent) else ", " if name == _REST else "; "
        if joint and len(lines[-1]) + len(joint) + len(part) > width:
            lines[-1] += joint.rstrip()
            lines.append(indent)
            joint = ""
        lines[-1] += joint + part
    return "\n".join(lines)


def _headline(report: Report) -> str:
    step = f", step {report.last_step}" if report.last_step is not None else ""
    of = f" of {report.max_steps}" if report.max_steps and step else ""
    counts = f"{many(len(report.attempts), 'attempt')}, {many(report.preemptions, 'preemption')}"
    return f"{report.root}: {report.state}{step}{of}; {counts}. Times are UTC, by each machine's own clock."


# -- the attempts ------------------------------------------------------------------------------------------------------


def _table(attempts: Sequence[AttemptReport]) -> Table:
    """A row for each attempt; columns without a value are left out."""
    rows = [_cells(one) for one in attempts]
    names = list(rows[0])
    shown = [name for name in names if name in ("", "from", "to", "ended") or any(row[name] != "-" for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in shown:
        left = name in ("where", "from", "to", "ended", "steps")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(row[name])) for name in shown))
    return table


def _cells(one: AttemptReport) -> dict[str, str]:
    place, times = one.place, one.times
    where = " ".join(part for part in (_infra(place), place.instance_type or place.accelerator) if part)
    lost = "-" if one.lost_steps is None else f"{'>=' if one.is_lost_at_least else ''}{one.lost_steps}"
    return {
        "": str(one.number),
        "where": f"{where}{f' x{place.nodes}' if place.nodes > 1 else ''}".strip() or "-",
        "rung": "-" if place.rung is None else str(place.rung),
        "from": _clock(one.began_at),
        "to": "now" if one.ended == RUNNING else _clock(one.ended_at),
        "ended": ended(one),
        "notice to commit": _seconds(one.committed_s),
        "steps": f"{(one.restored_step or 0) + 1}-{one.last_step}" if one.steps else "-",
        "lost": lost,
        "set-up": _seconds(times.setup or None),
        "restore": _seconds(times.restore or None),
    }


def _infra(place: Place) -> str:
    """The place, in short: without the region, where the zone's name begins with it."""
    if place.region and place.zone.startswith(place.region):
        return "/".join(part for part in (place.cloud, place.zone) if part)
    return place.infra


def ended(one: AttemptReport) -> str:
    """How an attempt ended: the kind of its notice, or the cause, with an exit code other than 0."""
    how = one.notice if one.notice and one.ended in (NOTICE, SIGNAL) else one.ended
    return f"{how} ({one.code})" if one.code else how


def _clock(at: float | None) -> str:
    try:
        return "-" if at is None else datetime.fromtimestamp(at, timezone.utc).strftime("%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else duration(value)


def _print(table: Table) -> None:
    """Print a table; a terminal that is too narrow wraps its lines, so nothing is cut off."""
    needed = sum(max(cell_len(str(cell)) for cell in (one.header, *one.cells)) + 2 for one in table.columns)
    console = Console(highlight=False)
    console.width = max(console.width, needed)
    console.print(table)


# -- in all ------------------------------------------------------------------------------------------------------------


def _summary(report: Report) -> list[tuple[str, str]]:
    lines = []
    if report.goodput is not None:
        productive, total = duration(report.times.productive), duration(report.times.total)
        lines.append(("Goodput", f"{report.goodput:.1%}: {productive} of {total} went into steps that are preserved"))
        lines.append((_REST, _rest(report.times)))
        at_least = "at least " if report.is_lost_at_least else ""
        done = sum(one.steps or 0 for one in report.attempts)
        lines.append(("Lost steps", f"{at_least}{report.lost_steps} of {done} done"))
    lines += _spend(report.spend)
    lines.append(("Interval", _interval(report.interval)))
    return lines


def _rest(times: Times) -> str:
    """Where the time went that was not productive, the largest first."""
    parts = sorted(((getattr(times, name), text) for name, text in _NAMES.items()), reverse=True)
    shown = [f"{text} {seconds / times.total:.1%} ({duration(seconds)})" for seconds, text in parts if seconds >= 0.05]
    return ", ".join(shown) or "nothing"


def _spend(spend: Spend) -> list[tuple[str, str]]:
    hours = _hours(spend.node_hours)
    if spend.usd is None:
        return [("Spend", f"no price is known; {hours}. --prices SPOT,ONDEMAND states one")]
    text = f"USD {spend.usd:.2f} for {hours} (prices: {', '.join(spend.sources)})"
    if spend.unpriced_attempts:
        left_out = f"{many(spend.unpriced_attempts, 'attempt')} with {_hours(spend.unpriced_node_hours)}"
        text += f"; without {left_out}, whose price is not known"
    lines = [("Spend", text)]
    if spend.on_demand_usd is not None and spend.on_demand_node_hours is not None:
        lines.append(("On demand", f"USD {spend.on_demand_usd:.2f} for {_hours(spend.on_demand_node_hours)}"))
    if spend.saving is not None and spend.on_demand_usd is not None:
        instead = f"USD {spend.usd:.2f} instead of USD {spend.on_demand_usd:.2f}"
        kind = "saved" if spend.saving >= 0 else "cost"
        more = "" if spend.saving >= 0 else " more"
        share = abs(spend.saving)
        lines.append(("Saving", f"This run {kind} {share:.0%}{more} against on-demand: {instead}."))
    return lines


def _hours(hours: float) -> str:
    return f"{hours:.3g} node-hours"


def _interval(interval: Interval) -> str:
    """The interval between saves that was used, and the best one."""
    steps, step_s = interval.chosen_steps, interval.step_s
    used = f"every {many(steps, 'step')} ({duration(steps * step_s)})" if steps and step_s else "not known"
    if interval.best_steps is None or step_s is None:
        return f"{used}; the best in hindsight: {interval.why_unknown}"
    best = f"{interval.best_steps} ({duration(interval.best_steps * step_s)})"
    text = f"{used}; the best in hindsight: {best}"
    if interval.chosen_loss is None or interval.best_loss is None:
        return text
    return f"{text}, which costs {interval.best_loss:.1%} of the time instead of {interval.chosen_loss:.1%}"


def _waits(attempts: Sequence[AttemptReport]) -> list[str]:
    """Why attempts waited, as SkyPilot's record says; attempts with the same reason in one line."""
    known = [(one.wait.why, one) for one in attempts if one.wait and one.wait.source == SKYPILOT and one.wait.why]
    lines = []
    for why, group in groupby(sorted(known, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        waited = [f"{one.number} ({duration(one.wait.seconds)})" for _, one in group if one.wait]
        lines.append(f"attempt {', '.join(waited)} waited for a machine: {why}")
    return lines
