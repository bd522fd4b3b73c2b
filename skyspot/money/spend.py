"""What a run has cost, and the same steps on demand: an estimate from the records, not the bill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skyspot.errors import UsageError, shown
from skyspot.money.attempts import Life
from skyspot.money.prices import Price
from skyspot.money.times import Times
from trainer.layout.lifetime import UNSEEN_S


@dataclass(frozen=True)
class Priced:
    """What one attempt has cost."""

    nodes: int
    node_s: float
    """Node time: from the start of its set-up to its end, times its nodes."""
    price: Price | None
    usd: float | None
    useful_s: float
    """The part of its time that an on-demand run would need, too: preserved steps, samples and evaluations."""
    setup_s: float

    @classmethod
    def of(cls, life: Life, times: Times, price: Price | None, *, has_ended: bool) -> Priced:
        """An attempt's cost.

        Args:
            life: Its account.
            times: Where its time went.
            price: Of a node; None: unknown.
            has_ended: False while it may still run.
        """
        nodes = life.place.nodes
        node_s = (life.seconds + (UNSEEN_S if has_ended and not life.has_end else 0.0)) * nodes
        usd = None if price is None else node_s / 3600 * price.usd_per_hour
        useful = times.productive + times.data + times.evaluation
        return cls(nodes, node_s, price, usd, useful, times.setup)


@dataclass(frozen=True)
class Spend:
    """What a run has cost; in USD, None: not known."""

    node_hours: float
    usd: float | None
    """Of the attempts with a price; None: none has one."""
    unpriced_attempts: int
    unpriced_node_hours: float
    on_demand_node_hours: float | None
    """What the preserved steps need without an interruption: their time and one set-up. None: no step was preserved."""
    on_demand_usd: float | None
    saving: float | None
    """Against on-demand, from 0 to 1; negative if the run has cost more. None: a price is missing."""
    sources: tuple[str, ...]
    """Where the prices are from."""


def spend_of(attempts: Sequence[Priced]) -> Spend:
    """The cost of a run."""
    known = [one for one in attempts if one.usd is not None]
    without = [one for one in attempts if one.usd is None]
    usd = math.fsum(one.usd or 0.0 for one in known) if known else None
    useful = _useful(attempts)
    prices = [one.price.on_demand_usd_per_hour if one.price else None for one, _ in useful]
    on_demand = None
    if useful and None not in prices:
        on_demand = math.fsum(hours * (price or 0.0) for (_, hours), price in zip(useful, prices, strict=True))
    saving = 1 - usd / on_demand if usd is not None and on_demand and not without else None
    return Spend(
        node_hours=math.fsum(one.node_s for one in attempts) / 3600,
        usd=usd,
        unpriced_attempts=len(without),
        unpriced_node_hours=math.fsum(one.node_s for one in without) / 3600,
        on_demand_node_hours=math.fsum(hours for _, hours in useful) if useful else None,
        on_demand_usd=on_demand,
        saving=saving,
        sources=tuple(dict.fromkeys(one.price.source for one in known if one.price)),
    )


def _useful(attempts: Sequence[Priced]) -> list[tuple[Priced, float]]:
    """Each attempt with preserved steps, and the node-hours that they need; the first one with its set-up."""
    found = [one for one in attempts if one.useful_s > 0]
    return [
        (one, (one.useful_s + (one.setup_s if number == 0 else 0.0)) * one.nodes / 3600)
        for number, one in enumerate(found)
    ]


def read_prices(value: str) -> Price:
    """The price that `--prices SPOT,ONDEMAND` states, in USD an hour and node.

    Raises:
        UsageError: it is not two prices, or they are in the order of `skyspot plan`.
    """
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not all(0 < one < 1e6 for one in numbers):
        raise UsageError(f"--prices: {shown(value)} is not SPOT,ONDEMAND in USD an hour and node, like 9.83,32.77")
    spot, on_demand = numbers
    if spot > on_demand:
        raise UsageError(
            f"--prices: SPOT {spot:g} is above ONDEMAND {on_demand:g}. The order is SPOT,ONDEMAND here, while `skyspot "
            "plan` takes ONDEMAND first"
        )
    return Price(spot, on_demand, "--prices")
