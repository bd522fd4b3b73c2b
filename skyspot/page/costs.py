"""What a run has cost over time, and what the same steps would have cost on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skyspot.money.report import Report
from skyspot.money.timeline import Band

USD, NODE_HOURS = "USD", "node-hours"


@dataclass(frozen=True)
class Costs:
    """Two lines: (seconds since the run began, cost until then). Their ends are the report's figures."""

    unit: str
    """USD; NODE_HOURS if no attempt has a price."""
    spent: tuple[tuple[float, float], ...]
    on_demand: tuple[tuple[float, float], ...]
    """As if it had run at once and without an interruption; empty: not known."""


def costs_of(bands: Sequence[Band], report: Report) -> Costs:
    """The costs of a run over time."""
    has_price = report.spend.usd is not None
    spent, paid = [(0.0, 0.0)], 0.0
    demand, worked_s, due = [(0.0, 0.0)], 0.0, 0.0
    is_known = True
    for band, one in zip(bands, report.attempts, strict=True):
        spent.append((band.start_s + one.times.waiting, paid))
        paid += (one.priced.usd or 0.0) if has_price else one.priced.node_s / 3600
        spent.append((band.end_s, paid))
        useful_s = one.priced.useful_s
        if useful_s > 0:
            seconds = useful_s + (one.priced.setup_s if len(demand) == 1 else 0.0)
            price = one.priced.price.on_demand_usd_per_hour if one.priced.price else None
            is_known = is_known and (price is not None or not has_price)
            worked_s += seconds
            due += seconds * one.priced.nodes / 3600 * ((price or 0.0) if has_price else 1.0)
            demand.append((worked_s, due))
    return Costs(USD if has_price else NODE_HOURS, tuple(spent), tuple(demand) if is_known and due else ())
