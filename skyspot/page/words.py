"""What the plots show, in words: for those who do not see them, and as the lines below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skyspot.money.report import Report
from skyspot.money.sentences import NAMES, knows_lost_steps, lost_steps, parts, saving
from skyspot.money.timeline import Band
from skyspot.page.costs import NODE_HOURS, USD, Costs
from skyspot.page.curves import Curve, Curves
from skyspot.wording import duration, figure, many

MOST_BARS, ROWS = 25, 12
"""With more attempts, a timeline shows the whole run in so many rows, in place of a bar for each attempt."""


@dataclass(frozen=True)
class About:
    """A plot in words."""

    title: str
    text: str
    caption: str = ""
    """What stands below it; empty: the text."""


def of_timeline(report: Report) -> About:
    """The timeline of attempts."""
    shares = [f"{NAMES[name]} {seconds / report.times.total:.1%}" for name, seconds in parts(report.times)]
    count = many(len(report.attempts), "attempt")
    text = f"{count} in {duration(report.times.total)}{': ' if shares else ''}{', '.join(shares)}."
    caption = "A bar for each attempt, from the wait for its machine to its end."
    if len(report.attempts) > MOST_BARS:
        caption = f"The whole run in {ROWS} rows of {duration(report.times.total / ROWS)}."
    return About("Timeline of the attempts", text, caption + (" Lost steps are hatched." if report.times.lost else ""))


def tips(bands: Sequence[Band], report: Report) -> dict[str, str]:
    """What a pointer shows over the pieces of a kind, by the id of their group: `attempt-2-lost`."""
    found = {}
    for band, one in zip(bands, report.attempts, strict=True):
        for name, seconds in parts(one.times):
            found[f"attempt-{band.number}-{name}"] = f"attempt {band.number}: {NAMES[name]} {duration(seconds)}"
    return found


def of_steps(report: Report) -> About:
    """The step over time."""
    worst = max(report.attempts, key=lambda one: one.lost_steps or 0)
    if not worst.lost_steps:
        known = knows_lost_steps(report)
        return About("Steps over time", "No step was lost." if known else "No lost step is recorded.")
    done = sum(one.steps or 0 for one in report.attempts)
    verb = "was" if report.lost_steps == 1 else "were"
    text = f"{lost_steps(report)[:1].upper()}{lost_steps(report)[1:]} of {done:,} steps {verb} done and lost"
    share = "all" if worst.lost_steps == report.lost_steps else f"{worst.lost_steps:,} of them"
    more = f", {share} in attempt {worst.number}" if len(report.attempts) > 1 else ""
    return About("Steps over time", f"{text}{more}: {duration(report.times.lost)} of work.")


def of_loss(curves: Curves) -> About:
    """Loss and learning rate."""
    points = curves.loss.points
    rate = " and learning rate" if curves.lr.points else ""
    text = "No preserved step has a loss."
    if points:
        text = f"The loss went from {points[0].mean:.4g} to {points[-1].mean:.4g}."
    if curves.resumes:
        shown = ", ".join(f"{step:,}" for step in curves.resumes[:8])
        more = f" and {len(curves.resumes) - 8} more" if len(curves.resumes) > 8 else ""
        text += f" Training resumed after step {shown}{more}: the dashed lines."
    if curves.lost:
        text += " The losses of lost steps are drawn in the colour of lost work."
    return About(f"Loss{rate} by step", text + _thinned(curves.loss))


def _thinned(curve: Curve) -> str:
    text = ""
    if curve.steps_per_point > 1:
        text += f" Each point is the mean of {curve.steps_per_point} steps; the band spans their losses."
    if curve.without:
        text += (
            f" {many(curve.without, 'step')} without a finite loss {'is' if curve.without == 1 else 'are'} left out."
        )
    return text


def of_cost(costs: Costs, report: Report) -> About:
    """The cost over time."""
    title = "Cost over time, beside on-demand" if costs.unit == USD else "Node-hours over time"
    if costs.unit == NODE_HOURS:
        needed = f", {figure(costs.on_demand[-1][1])} of which an undisturbed run needs" if costs.on_demand else ""
        return About(title, f"The run took {figure(costs.spent[-1][1])} node-hours{needed}. No price is known.")
    text = saving(report.spend) or f"The run cost USD {costs.spent[-1][1]:,.2f}."
    if costs.on_demand:
        took = duration(costs.on_demand[-1][0])
        text += f" The same steps on demand take {took}: one set-up, no wait, nothing lost."
    else:
        text += " The on-demand price is not known."
    if report.spend.unpriced_attempts:
        text += f" {many(report.spend.unpriced_attempts, 'attempt')} without a price left out."
    return About(title, text)
