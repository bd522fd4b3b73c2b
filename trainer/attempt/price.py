"""The price of the machines of an attempt, from the ladder's prices that travel with the task. Standard library only.

SKYSPOT_PRICES has a JSON list with an object for each rung that has a price:

    {"rung": 1, "spot": true, "machines": ["A100:8"], "on_demand": 48.35,
     "places": {"aws/us-east-1/use1-az1": [9.83, 32.77, "p4d.24xlarge"]}}

Prices are in USD an hour and for one node. A place has the price in the rung's market, the price on demand (null: not
known) and the instance type. `on_demand` is the dearest on-demand price of the rung's machine.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trainer.layout.accelerators import OTHER_NUMBER, likeness

PRICES = "SKYSPOT_PRICES"


@dataclass(frozen=True)
class Offer:
    """What a node costs in a place."""

    usd_per_hour: float
    on_demand_usd_per_hour: float | None
    instance_type: str


@dataclass(frozen=True)
class Rung:
    """A rung of the ladder with its prices."""

    number: int
    use_spot: bool
    machines: tuple[str, ...]
    """Alternatives as asked for: `A100:8`, an instance type, or `CPU`."""
    places: Mapping[str, Offer]
    """By place: cloud/region/zone, a place around it, or empty for everywhere."""
    on_demand_usd_per_hour: float | None
    """The dearest; None: there is none."""

    def offer(self, place: Mapping[str, Any]) -> Offer | None:
        """What a node costs in an attempt's place, or in the place around it; None: not known."""
        parts = [str(place.get(key) or "").lower() for key in ("cloud", "region", "zone")]
        for count in (3, 2, 1, 0):
            if all(parts[:count]) and (found := self.places.get("/".join(parts[:count]))):
                return found
        # Where a zone is not recorded, the dearest one of its region.
        region = "/".join(parts[:2]) + "/"
        inside = [one for name, one in self.places.items() if name.startswith(region)]
        return max(inside, key=lambda one: one.usd_per_hour) if inside and all(parts[:2]) and not parts[2] else None

    @property
    def dearest(self) -> float:
        """The dearest price that is known of it."""
        known = [one.usd_per_hour for one in self.places.values()]
        return max([*known, self.on_demand_usd_per_hour or 0.0])


def read_ladder(text: str) -> tuple[Rung, ...]:
    """The rungs with a price; empty if the text is none of skyspot's."""
    found = []
    with suppress(ValueError, TypeError, KeyError, AttributeError, IndexError):
        for one in json.loads(text):
            places = {str(name).lower(): _offer(*values) for name, values in one["places"].items()}
            machines = tuple(map(str, one["machines"]))
            found.append(Rung(int(one["rung"]), bool(one["spot"]), machines, places, _usd(one.get("on_demand"))))
        return tuple(found)
    return ()


def _offer(usd: Any, on_demand: Any = None, instance_type: Any = "") -> Offer:
    price = _usd(usd)
    if price is None:
        raise ValueError(f"{usd} is no price")
    return Offer(price, _usd(on_demand), str(instance_type or ""))


def _usd(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and 0 < value < 1e6 else None


def price_here(place: Mapping[str, Any]) -> dict[str, Any]:
    """The rung that this machine is on, and its price, for the attempt's record; empty without known prices.

    Keys: usd_per_hour and on_demand_usd_per_hour; rung, use_spot and instance_type, where they are known.

    Args:
        place: Where this machine is, and what it has; as of `machine.place`.
    """

    def is_spot() -> bool | None:
        from trainer.notices.here import is_spot_here  # Network code, which is rarely needed.

        return is_spot_here(str(place.get("cloud") or "").lower())

    return price_of(place, read_ladder(os.environ.get(PRICES, "")), is_spot)


def price_of(
    place: Mapping[str, Any], ladder: Sequence[Rung], is_spot: Callable[[], bool | None] = lambda: None
) -> dict[str, Any]:
    """The rung and the price of a machine; what cannot be told apart counts as the dearest.

    The zone's price counts; the on-demand price where it is unknown.

    Args:
        place: Where the machine is, and what it has.
        ladder: The rungs with their prices.
        is_spot: Asked where spot and on-demand rungs fit alike; returns None if that is not known.
    """
    alike = _alike(place, ladder)
    here = [(rung, offer) for rung in alike if (offer := rung.offer(place))]
    if len({rung.use_spot for rung, _ in here}) > 1 and (known := is_spot()) is not None:
        here = [(rung, offer) for rung, offer in here if rung.use_spot is known]
    if not here:
        dearest = max((rung.on_demand_usd_per_hour or rung.dearest for rung in alike), default=None)
        market = {} if any(rung.use_spot for rung in ladder) else {"use_spot": False}
        return {} if dearest is None else {**market, "usd_per_hour": dearest, "on_demand_usd_per_hour": dearest}
    if len({rung.use_spot for rung, _ in here}) > 1:
        on_demand = max(_on_demand(rung, offer) for rung, offer in here)
        return {"usd_per_hour": on_demand, "on_demand_usd_per_hour": on_demand}
    rung, offer = here[0] if _likeness_to(place, here[0][0]) > 0 else max(here, key=lambda one: one[1].usd_per_hour)
    found = {"rung": rung.number, "use_spot": rung.use_spot, "usd_per_hour": offer.usd_per_hour}
    if offer.on_demand_usd_per_hour is not None:
        found["on_demand_usd_per_hour"] = offer.on_demand_usd_per_hour
    return {**found, "instance_type": offer.instance_type} if offer.instance_type else found


def _on_demand(rung: Rung, offer: Offer) -> float:
    """The on-demand price of a place, or of the rung's machine; the price itself where neither is known."""
    return offer.on_demand_usd_per_hour or rung.on_demand_usd_per_hour or offer.usd_per_hour


def _alike(place: Mapping[str, Any], ladder: Sequence[Rung]) -> list[Rung]:
    """The rungs whose machine is most like an attempt's: those that name its accelerator, else all with its number."""
    found = [_likeness_to(place, rung) for rung in ladder]
    return [rung for rung, like in zip(ladder, found, strict=True) if like == max(found)]


def _likeness_to(place: Mapping[str, Any], rung: Rung) -> int:
    """As of `likeness`; another name counts as none, 0: a driver may call a machine what no rung does."""
    name, per_node = str(place.get("accelerator") or ""), place.get("accelerators_per_node")
    found = [likeness(machine, name, per_node) for machine in rung.machines]
    return max([like if like == OTHER_NUMBER else max(like, 0) for like in found], default=0)
