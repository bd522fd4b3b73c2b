"""The rung that an attempt ran on, and its price: found in the ladder of the run's task, from the attempt's place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from skyspot.money import prices
from skyspot.money.attempts import Life, Place, Price
from skyspot.money.prices import RungPrice

CATALOG = "catalog"


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
            best = max((likeness for likeness, _ in fitting), default=0)
            rung = next((rung for likeness, rung in fitting if likeness == best and best), None)
            if rung:
                found[life.name] = Match(rung.number, rung.use_spot, _price(life.place, rung))
    return found


def stated(match: Match | None, price: Price) -> Price:
    """The price of `--prices` for an attempt: that of on-demand, if its rung is no spot rung."""
    if match and not match.use_spot and price.on_demand_usd_per_hour is not None:
        return Price(price.on_demand_usd_per_hour, price.on_demand_usd_per_hour, price.source)
    return price


def _places(place: Place, rung: RungPrice) -> list[prices.Place]:
    """Where a rung offers its machine, of those that may be an attempt's place; the cheapest first."""
    return [
        offer
        for offer in rung.places
        if offer.cloud in ("", place.cloud)
        and _agree(offer.region, place.region)
        and _agree(offer.zone, place.zone)
        and _agree(offer.instance_type, place.instance_type)
    ]


def _agree(one: str | None, other: str) -> bool:
    return not one or not other or one.lower() == other.lower()


def _likeness(place: Place, rung: RungPrice) -> int:
    """The number of parts of a rung's name, where all are words of the driver's; 0: it is another accelerator.

    1, too, where one of the two has no name. The trainer compares by the same words (trainer/attempt/price.py).
    """
    words = [word for word in re.split(r"[\s-]+", place.accelerator.lower()) if word]
    known = {*words, *(f"{one}{other}" for one, other in pairwise(words))}
    found = 0
    for alternative in rung.accelerators.split(" or "):
        name, _, count = alternative.partition(":")
        parts = name.lower().split("-")
        if place.accelerators_per_node and count and float(count) != place.accelerators_per_node:
            continue
        if words and count and not known.issuperset(parts):
            continue
        found = max(found, len(parts) if words and count else 1)
    return found


def _price(place: Place, rung: RungPrice) -> Price | None:
    for offer in _places(place, rung):
        usd = offer.usd_per_hour(rung.use_spot)
        if usd is not None:
            return Price(usd, offer.on_demand_usd_per_hour, CATALOG)
    return None


def by_attempt(lives: Sequence[Life], matches: Mapping[str, Match], stated_price: Price | None) -> dict[str, Price]:
    """The price of each attempt: what the user states, or else that of its rung."""
    found = {}
    for life in lives:
        match = matches.get(life.name)
        price = stated(match, stated_price) if stated_price else match.price if match else None
        if price:
            found[life.name] = price
    return found
