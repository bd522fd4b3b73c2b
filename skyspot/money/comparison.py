"""The cost comparison of a plan: the same training on demand, as spot in one region, in many, and over the ladder."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from skyspot.errors import UsageError, shown
from skyspot.money.expected import NEVER_HOURS, Preemptions
from skyspot.money.prices import OFFERED, Place, RungPrice, saving

ON_DEMAND, ONE_REGION, MANY_REGIONS, MIX = "on-demand", "spot, one region", "spot, many regions", "the ladder's mix"


@dataclass(frozen=True)
class Way:
    """One way to do the training. Hours and USD without preemptions, and as expected with them."""

    name: str
    usd_per_hour: float
    """Of one node."""
    hours: float
    usd: float
    """Of all nodes."""
    saving: float | None
    """Against on-demand, from 0 to 1."""
    expected_hours: float | None
    """None: it never ends."""
    expected_usd: float | None
    expected_saving: float | None


@dataclass(frozen=True)
class Stated:
    """Prices that replace the catalog's: `--prices ONDEMAND,SPOT_ONE,SPOT_MANY,MIX[:HOURS]`, for a node."""

    usd_per_hour: tuple[float, float, float, float]
    mix_hours: float | None
    """The mix may take longer, because its machines are slower; None: as long as the others."""


def read_stated_prices(text: str) -> Stated:
    """Parse `--prices`.

    Raises:
        UsageError: it is not four prices.
    """
    found = re.fullmatch(r"\s*(.+?)\s*(?::\s*([0-9.]+)\s*)?", text)
    try:
        numbers = [float(part) for part in found[1].split(",")] if found else []
        hours = float(found[2]) if found and found[2] else None
    except ValueError:
        numbers, hours = [], None
    if len(numbers) != 4 or not all(0 < one < 1e6 for one in [*numbers, 1.0 if hours is None else hours]):
        raise UsageError(
            f"--prices: {shown(text)} is not ONDEMAND,SPOT_ONE,SPOT_MANY,MIX[:HOURS], like 32.77,9.83,7.20,5.50:24"
        )
    return Stated((numbers[0], numbers[1], numbers[2], numbers[3]), hours)


def compare(
    prices: Sequence[tuple[str, float, float | None]], hours: float, nodes: int, losses: Preemptions
) -> list[Way]:
    """The ways with what they cost.

    Args:
        prices: Name, USD an hour for a node, and hours of work where these differ; on-demand first, if it is there.
        hours: Of work.
        nodes: Number of nodes.
        losses: What the ways other than on-demand lose to preemptions.
    """
    on_demand_usd = next((usd * hours * nodes for name, usd, _ in prices if name == ON_DEMAND), None)
    found = []
    for name, usd_per_hour, own_hours in prices:
        work = hours if own_hours is None else own_hours
        usd = usd_per_hour * work * nodes
        wall = work if name == ON_DEMAND else work * losses.factor()
        ends = math.isfinite(wall) and wall < NEVER_HOURS
        expected = usd_per_hour * wall * nodes if ends else None
        against = None if name == ON_DEMAND else on_demand_usd
        found.append(
            Way(name, usd_per_hour, work, usd, saving(usd, against), wall if ends else None, expected,
                saving(expected, against))
        )  # fmt: skip
    return found


def stated_ways(stated: Stated) -> list[tuple[str, float, float | None]]:
    """The ways of `--prices`."""
    names = (ON_DEMAND, ONE_REGION, MANY_REGIONS, MIX)
    hours = (None, None, None, stated.mix_hours)
    return list(zip(names, stated.usd_per_hour, hours, strict=True))


def ladder_ways(rungs: Sequence[RungPrice]) -> list[tuple[str, float, float | None]]:
    """The ways of a ladder, at its catalog prices; those without a price are left out.

    The machine is the first one that can be had. On-demand: its cheapest place. One region: the cheapest spot zone of
    the region where it is cheapest on demand, which one would choose without spot; if its rung is restricted to a
    region, of that one. Many regions: the cheapest spot place. The mix: the mean of the cheapest places of all spot
    rungs, for each an equal share of the hours.
    """
    there = [rung for rung in rungs if rung.status == OFFERED]
    if not there:
        return []
    machine = there[0].accelerators
    alike = [rung for rung in there if rung.accelerators == machine]
    same = [place for rung in alike for place in rung.places]
    prices = {
        ON_DEMAND: min(filter(None, (rung.on_demand_usd_per_hour for rung in alike)), default=None),
        ONE_REGION: _least(_one_region(there[0], same)),
        MANY_REGIONS: _least(same),
        MIX: _mean([rung.usd_per_hour for rung in there if rung.use_spot]),
    }
    return [(name, usd, None) for name, usd in prices.items() if usd is not None]


def _one_region(first: RungPrice, places: Sequence[Place]) -> list[Place]:
    """The spot places of one region."""
    restricted = len({(place.cloud, place.region) for place in first.places}) == 1
    candidates = [one for one in (first.places if restricted else places) if one.spot_usd_per_hour is not None]
    priced = [one for one in candidates if one.on_demand_usd_per_hour is not None] or candidates
    if not priced:
        return []
    home = min(priced, key=lambda one: (one.on_demand_usd_per_hour or 0.0, one.spot_usd_per_hour or 0.0, one.infra))
    return [one for one in candidates if (one.cloud, one.region) == (home.cloud, home.region)]


def _least(places: Sequence[Place]) -> float | None:
    """The lowest spot price."""
    return min((usd for place in places if (usd := place.spot_usd_per_hour) is not None), default=None)


def _mean(prices: Sequence[float | None]) -> float | None:
    known = [price for price in prices if price is not None]
    return sum(known) / len(known) if known else None
