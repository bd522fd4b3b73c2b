"""A report in words: the same sentences for the terminal and for the page. Texts may hold any character of a record."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import groupby

from skyspot.money.attempts import NOTICE, RUNNING, SIGNAL, Place
from skyspot.money.hindsight import Interval
from skyspot.money.report import AttemptReport, Report
from skyspot.money.spend import Spend
from skyspot.money.times import Times
from skyspot.money.waiting import SKYPILOT
from skyspot.wording import duration, figure, many

NAMES = {
    "productive": "productive", "setup": "set-up", "restore": "restore", "saving": "saving", "lost": "lost steps",
    "waiting": "waiting for a machine", "evaluation": "evaluation", "data": "data", "other": "other",
}  # fmt: skip
"""What Times are called."""
REST = "The rest"
MONEY = ("Spend", "On demand", "Saving")
_LEAST_SHOWN_S = 0.05


def state(report: Report) -> str:
    """`finished, step 20 of 20; 3 attempts, 2 preemptions`."""
    step = f", step {report.last_step}" if report.last_step is not None else ""
    of = f" of {report.max_steps}" if report.max_steps and step else ""
    counts = f"{many(len(report.attempts), 'attempt')}, {many(report.preemptions, 'preemption')}"
    return f"{report.state}{step}{of}; {counts}"


def cells(one: AttemptReport) -> dict[str, str]:
    """The row of an attempt by column; a dash: nothing to show."""
    place, times = one.place, one.times
    where = " ".join(part for part in (_infra(place), place.instance_type or place.accelerator) if part)
    lost = "-" if one.lost_steps is None else f"{'>=' if one.is_lost_at_least else ''}{one.lost_steps}"
    return {
        "": str(one.number),
        "where": f"{where}{f' x{place.nodes}' if place.nodes > 1 else ''}".strip() or "-",
        "rung": "-" if place.rung is None else str(place.rung),
        "from": clock(one.began_at),
        "to": "now" if one.ended == RUNNING else clock(one.ended_at),
        "ended": ended(one),
        "notice to commit": _seconds(one.committed_s),
        "steps": f"{(one.restored_step or 0) + 1}-{one.last_step}" if one.steps else "-",
        "lost": lost,
        "set-up": _seconds(times.setup or None),
        "restore": _seconds(times.restore or None),
    }


def shown_columns(rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns with a value in some row."""
    return [
        name for name in rows[0] if name in ("", "from", "to", "ended") or any(row[name] != "-" for row in rows)
    ]  # fmt: skip


def _infra(place: Place) -> str:
    """The place, in short: without the region, where the zone's name begins with it."""
    if place.region and place.zone.startswith(place.region):
        return "/".join(part for part in (place.cloud, place.zone) if part)
    return place.infra


def ended(one: AttemptReport) -> str:
    """How an attempt ended: the kind of its notice, or the cause, with an exit code other than 0."""
    how = one.notice if one.notice and one.ended in (NOTICE, SIGNAL) else one.ended
    return f"{how} ({one.code})" if one.code else how


def clock(at: float | None) -> str:
    """`01-15 07:58:50`, of Unix seconds; a dash if they are unknown."""
    try:
        return "-" if at is None else datetime.fromtimestamp(at, timezone.utc).strftime("%m-%d %H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else duration(value)


def summary(report: Report) -> list[tuple[str, str]]:
    """(name, text) of each line below the attempts."""
    lines = []
    if report.goodput is not None:
        productive, total = duration(report.times.productive), duration(report.times.total)
        lines.append(("Goodput", f"{report.goodput:.1%}: {productive} of {total} went into steps that are preserved"))
        lines.append((REST, _rest(report.times)))
        done = sum(one.steps or 0 for one in report.attempts)
        known = knows_lost_steps(report)
        lines.append(("Lost steps", f"{lost_steps(report)} of {done} done" if known else f"not known ({done} done)"))
    lines += _spend(report.spend)
    lines.append(("Interval", _interval(report.interval)))
    return lines


def lost_steps(report: Report) -> str:
    """`at least 3`."""
    return f"{'at least ' if report.is_lost_at_least else ''}{report.lost_steps}"


def knows_lost_steps(report: Report) -> bool:
    """False if an attempt was killed without a word, and no lost step is recorded: its last steps are not known."""
    return bool(report.lost_steps) or not report.is_lost_at_least


def parts(times: Times) -> list[tuple[str, float]]:
    """(field of Times, seconds) of all that took time, the largest first."""
    found = [(name, getattr(times, name)) for name in NAMES]
    return sorted((one for one in found if one[1] >= _LEAST_SHOWN_S), key=lambda one: (one[1], one[0]), reverse=True)


def _rest(times: Times) -> str:
    """Where the time went that was not productive, the largest first."""
    shown = [
        f"{NAMES[name]} {seconds / times.total:.1%} ({duration(seconds)})"
        for name, seconds in parts(times)
        if name != "productive"
    ]
    return ", ".join(shown) or "nothing"


def _spend(spend: Spend) -> list[tuple[str, str]]:
    hours = node_hours(spend.node_hours)
    if spend.usd is None:
        return [("Spend", f"no price is known; {hours}. --prices SPOT,ONDEMAND states one")]
    text = f"USD {spend.usd:,.2f} for {hours} (prices: {', '.join(spend.sources)})"
    if spend.unpriced_attempts:
        left_out = f"{many(spend.unpriced_attempts, 'attempt')} with {node_hours(spend.unpriced_node_hours)}"
        text += f"; without {left_out}, whose price is not known"
    lines = [("Spend", text)]
    if spend.on_demand_usd is not None and spend.on_demand_node_hours is not None:
        lines.append(("On demand", f"USD {spend.on_demand_usd:,.2f} for {node_hours(spend.on_demand_node_hours)}"))
    if said := saving(spend):
        lines.append(("Saving", said))
    return lines


def saving(spend: Spend) -> str:
    """The line to quote: `This run saved 44% against on-demand: USD 0.67 instead of USD 1.20.` Empty: not known."""
    if spend.saving is None or spend.usd is None or spend.on_demand_usd is None:
        return ""
    instead = f"USD {spend.usd:,.2f} instead of USD {spend.on_demand_usd:,.2f}"
    if spend.saving < 0:
        return f"This run cost {-spend.saving:.0%} more than on-demand would have: {instead}."
    return f"This run saved {spend.saving:.0%} against on-demand: {instead}."


def node_hours(hours: float) -> str:
    """`0.163 node-hours`."""
    return f"{figure(hours)} node-hours"


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


def notes(report: Report) -> list[str]:
    """Why attempts waited, as SkyPilot's record says, those with the same reason in one note; then all other notes."""
    known = [
        (one.wait.why, one) for one in report.attempts if one.wait and one.wait.source == SKYPILOT and one.wait.why
    ]
    lines = []
    for why, group in groupby(sorted(known, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        waited = [f"{one.number} ({duration(one.wait.seconds)})" for _, one in group if one.wait]
        lines.append(f"attempt {', '.join(waited)} waited for a machine: {why}")
    return [*lines, *report.notes]
