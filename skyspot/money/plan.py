"""The plan of a task: its ladder with prices, its length, and the cost comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from skyspot.money.comparison import MIX, ON_DEMAND, Stated, Way, compare, ladder_ways, stated_ways
from skyspot.money.expected import Preemptions
from skyspot.money.prices import CUT, RungPrice, saving
from skyspot.money.pricing import Market, price_ladder
from skyspot.task.document import Task
from skyspot.task.limits import limits_of, shown_time
from skyspot.wording import amount


@dataclass(frozen=True)
class Length:
    """How long a training takes, without preemptions."""

    hours: float
    why: str
    """Where it is from, for a sentence: `20 h`, or `5000 steps of 0.5 s`."""


@dataclass(frozen=True)
class TaskPlan:
    """The plan of one task."""

    name: str
    nodes: int
    ordered: bool
    rungs: tuple[RungPrice, ...]
    length: Length | None
    """None: unknown; the comparison is then for one hour of training."""
    losses: Preemptions
    ways: tuple[Way, ...]
    stated: bool
    """True if the prices of the comparison are the user's (`--prices`), not the ladder's."""
    max_spend_usd: float | None = None
    """The task's spend limit; None: none."""
    deadline: float | None = None
    """The task's deadline, in unix seconds; None: none."""
    now: float = 0.0
    """When it was made, in unix seconds."""
    spent_usd: float = 0.0
    """What the run has spent already, where its records say so."""

    @property
    def limits_passed(self) -> list[str]:
        """The limits that would be passed, each in a sentence: by a rung's cheapest place, and by the whole run."""
        rungs = [f"rung {rung.number}: {passed}" for rung in self.rungs if (passed := limit_passed(rung))]
        return [*rungs, *self.run_limits_passed]

    @property
    def expected(self) -> Way | None:
        """The way that the run is expected to go: over its ladder. None: its length or its prices are not known."""
        ways = {way.name: way for way in self.ways}
        return (ways.get(MIX) or ways.get(ON_DEMAND)) if self.length else None

    @property
    def run_limits_passed(self) -> list[str]:
        """The limits that the whole run is expected to pass, each in a sentence."""
        way, found = self.expected, []
        if way is None:
            return []
        most, usd, spent = self.max_spend_usd, way.expected_usd, self.spent_usd
        if most is not None and (usd is None or usd + spent > most):
            total = "has no end" if usd is None else f"is USD {usd + spent:,.2f}"
            already = f", of which USD {spent:,.2f} is spent" if spent and usd is not None else ""
            found.append(f"--max-spend {amount(most)}: the expected total ({way.name}) {total}{already}")
        if self.deadline is not None:
            left_h = max(0.0, self.deadline - self.now) / 3600
            if way.expected_hours is None or way.expected_hours > left_h:
                needs = "never ends" if way.expected_hours is None else f"takes {way.expected_hours:.1f} h"
                found.append(
                    f"--deadline {shown_time(self.deadline)}: {left_h:.1f} h are left, and the run is expected to take "
                    f"more ({way.name}: {needs})"
                )
        return found

    @property
    def limits_line(self) -> str:
        """The limits of the run, for a line; empty without any."""
        parts = [f"about USD {amount(self.max_spend_usd)}"] if self.max_spend_usd is not None else []
        parts += [shown_time(self.deadline)] if self.deadline is not None else []
        return f"saves and stops at {' or at '.join(parts)}, and stays stopped" if parts else ""

    def total_usd(self, usd_per_hour: float | None) -> float | None:
        """What the training costs at a price of one node, without preemptions; None if one of the two is unknown."""
        return None if self.length is None or usd_per_hour is None else usd_per_hour * self.length.hours * self.nodes


def limit_passed(rung: RungPrice) -> str:
    """The limit that a rung's cheapest place costs more than; empty if there is none."""
    if rung.status == CUT:
        return rung.why
    if rung.limit_usd_per_hour is not None and (rung.usd_per_hour or 0.0) > rung.limit_usd_per_hour:
        return (
            f"max_hourly_cost {rung.limit_usd_per_hour:g} is not applied to it, and its cheapest place costs "
            f"{rung.usd_per_hour:.2f}"
        )
    return ""


def plan_task(
    task: Task, name: str, market: Market, length: Length | None, losses: Preemptions, stated: Stated | None
) -> TaskPlan:
    """Plan one task.

    Args:
        task: The task.
        name: Its name.
        market: The prices on this machine.
        length: Of the training; None: unknown.
        losses: What to expect of preemptions.
        stated: Prices for the comparison; None: the ladder's.
    """
    rungs = price_ladder(task, market)
    prices = stated_ways(stated) if stated else ladder_ways(rungs)
    ways = compare(prices, length.hours if length else 1.0, task.num_nodes, losses)
    return TaskPlan(
        name, task.num_nodes, task.ordered, rungs, length, losses, tuple(ways), stated is not None, *limits_of(task),
        now=time.time(),
    )  # fmt: skip


def plan_json(plans: Sequence[TaskPlan], market: Market, notes: Sequence[str]) -> dict[str, Any]:
    """The plans of a file's tasks as JSON; prices in USD an hour and node, totals in USD for all nodes."""
    return {
        "tasks": [_task_json(plan) for plan in plans],
        "catalogs": [
            {"cloud": one.cloud, "path": str(one.path), "downloaded_at": one.downloaded_at,
             "problems": list(one.problems)}
            for one in market.catalogs.values()
        ],
        "clouds": list(market.clouds),
        "clouds_are_enabled": market.is_enabled,
        "limits_passed": [passed for plan in plans for passed in plan.limits_passed],
        "notes": list(notes),
    }  # fmt: skip


def _task_json(plan: TaskPlan) -> dict[str, Any]:
    rungs = [
        {**rung.to_json(), "total_usd": plan.total_usd(rung.usd_per_hour),
         "saving": rung_saving(rung), "limit_passed": limit_passed(rung) or None}
        for rung in plan.rungs
    ]  # fmt: skip
    return {
        "name": plan.name,
        "nodes": plan.nodes,
        "ordered": plan.ordered,
        "rungs": rungs,
        "hours": plan.length.hours if plan.length else None,
        "length": plan.length.why if plan.length else None,
        "max_spend_usd": plan.max_spend_usd,
        "deadline": plan.deadline,
        "preemptions": {**asdict(plan.losses), "save_interval_s": plan.losses.interval_s},
        "comparison": {
            "hours": plan.length.hours if plan.length else 1.0,
            "prices_are_stated": plan.stated,
            "ways": [asdict(way) for way in plan.ways],
        },
    }


def rung_saving(rung: RungPrice) -> float | None:
    """The share that a rung's cheapest place saves against its own on-demand price; None for on-demand rungs."""
    cheapest = rung.cheapest
    return saving(rung.usd_per_hour, cheapest.on_demand_usd_per_hour) if cheapest and rung.use_spot else None
