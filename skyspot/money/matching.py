"""The rung that an attempt ran on, and its price: found in the ladder of the run's task, from the attempt's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skyspot.money import prices
from skyspot.money.attempts import Life, Place
from skyspot.money.prices import Price, RungPrice
from trainer.layout.accelerators import UNNAMED, likeness

CATALOG, DEAREST = "catalog", "catalog, the dearest zone of the region"
"""Where a price is from. DEAREST: the catalog has zone ids alone, so the zone is not known; `launch` counts so, too."""


@dataclass(frozen=True)
class Match:
    """A rung of the ladder."""

    rung: int
    """From 1."""
    use_spot: bool
    price: Price | None
    """Of a node, where the attempt ran; None: not known."""


def match_rungs(lives: Sequence[Life], rungs: Sequence[RungPrice]) -> dict[str, Match]:
    """By attempt's name: the first rung of the ladder that offers a machine like its own in its place.

    An attempt whose place is not recorded matches no rung. Of rungs that differ in the accelerator, the one whose name
    says most of the driver's name counts: an A100-80GB is no A100.
    """
    found = {}
    for life in lives:
        if life.place.cloud:
            fitting = [(_likeness(life.place, rung), rung) for rung in rungs if _places(life.place, rung)]
            best = max((like for like, _ in fitting), default=0)
            rung = next((rung for like, rung in fitting if like == best and best), None)
            if rung:
                found[life.name] = Match(rung.number, rung.use_spot, _price(life.place, rung))
    return found


def stated(match: Match | None, price: Price) -> Price:
    """The price of `--prices` for an attempt: that of on-demand, if its rung is no spot rung."""
    if match and not match.use_spot and price.on_demand_usd_per_hour is not None:
        return Price(price.on_demand_usd_per_hour, price.on_demand_usd_per_hour, price.source)
    return price


def _places(place: Place, rung: RungPrice) -> list[prices.Place]:
    """Where a rung offers its machine, of those that may be an attempt's place; the cheapest first.

    AWS's zone id says nothing of the name that a machine knows, so any zone of the region may be its own.
    """
    return [
        offer
        for offer in rung.places
        if offer.cloud in ("", place.cloud)
        and _agree(offer.region, place.region)
        and (_agree(offer.zone, place.zone) or (offer.has_zone_id and bool(place.region)))
        and _agree(offer.instance_type, place.instance_type)
    ]


def _agree(one: str | None, other: str) -> bool:
    return not one or not other or one.lower() == other.lower()


def _likeness(place: Place, rung: RungPrice) -> int:
    """As of `likeness`; 0: it is another accelerator; 1, too, where the rung or the driver gives no name."""
    machines = rung.accelerators.split(" or ")
    found = [likeness(machine, place.accelerator, place.accelerators_per_node) for machine in machines]
    return max(1 if like == UNNAMED else max(like, 0) for like in found)


def _price(place: Place, rung: RungPrice) -> Price | None:
    """The price of an attempt's place; that of its region's dearest zone where zones are known by ids alone."""
    zones: dict[str, prices.Place] = {}
    for offer in _places(place, rung):  # Of several instance types in a zone, SkyPilot takes the cheapest.
        zones.setdefault(offer.infra, offer)
    offers = list(zones.values())
    if not offers:
        return None
    offer = next((one for one in offers if not one.has_zone_id), offers[-1])
    usd = offer.usd_per_hour(rung.use_spot)
    source = DEAREST if offer.has_zone_id and rung.use_spot else CATALOG
    return None if usd is None else Price(usd, offer.on_demand_usd_per_hour, source)


def by_attempt(lives: Sequence[Life], matches: Mapping[str, Match], stated_price: Price | None) -> dict[str, Price]:
    """The price of each attempt: what the user states, or else that of its rung."""
    found = {}
    for life in lives:
        match = matches.get(life.name)
        price = stated(match, stated_price) if stated_price else match.price if match else None
        if price:
            found[life.name] = price
    return found
