"""The prices of a ladder: what each rung costs where, in a form that travels as JSON with the task.

All prices are in USD an hour and for one node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

OFFERED, CUT, NEVER, UNKNOWN = "offered", "cut", "never", "unknown"
"""A rung's status: to be had; cut off by max_hourly_cost; offered nowhere; its price is not known here."""


_ZONE_ID = re.compile(r"[a-z]+[0-9]+(-[a-z]+[0-9]+)*-az[0-9]+")


@dataclass(frozen=True)
class Place:
    """A place where a rung's machine is offered, and what one node costs there."""

    cloud: str
    """Empty: a price of skyspot.yaml that names no place."""
    region: str | None
    zone: str | None
    instance_type: str
    """Empty: a price of skyspot.yaml that names none."""
    spot_usd_per_hour: float | None
    """None: not offered as spot."""
    on_demand_usd_per_hour: float | None

    @property
    def infra(self) -> str:
        """The place in SkyPilot's spelling: cloud/region/zone."""
        return "/".join(part for part in (self.cloud, self.region, self.zone) if part) or "anywhere"

    @property
    def has_zone_id(self) -> bool:
        """True if its zone is AWS's id (use1-az1), where a machine knows its account's own name of it (us-east-1a)."""
        return self.cloud == "aws" and bool(self.region) and _ZONE_ID.fullmatch(self.zone or "") is not None

    def usd_per_hour(self, use_spot: bool) -> float | None:
        """The price of a node as spot or on demand."""
        return self.spot_usd_per_hour if use_spot else self.on_demand_usd_per_hour


@dataclass(frozen=True)
class Price:
    """The price of a node, in USD an hour."""

    usd_per_hour: float
    on_demand_usd_per_hour: float | None
    source: str
    """Where it is from: `recorded`, `--prices`, one of those in matching.py, or a rung of skyspot.yaml."""


@dataclass(frozen=True)
class RungPrice:
    """A rung with the places where it is offered in its market, the cheapest first."""

    number: int
    """From 1, in the ladder's order."""
    accelerators: str
    """As asked for: `A100:8`, `A100:8 or L4:8`, an instance type, or `CPU`."""
    where: str
    """The place that the rung is restricted to; empty: SkyPilot may choose."""
    use_spot: bool
    nodes: int
    places: tuple[Place, ...]
    on_demand_usd_per_hour: float | None
    """The lowest on-demand price of one node, also of places that have no spot; None: there is none."""
    limit_usd_per_hour: float | None
    """Its max_hourly_cost, for one node; None: none."""
    status: str
    why: str = ""
    """The reason of a status other than OFFERED, in a sentence."""
    remarks: tuple[str, ...] = ()
    """What else a user has to know about these prices."""

    @property
    def cheapest(self) -> Place | None:
        """The place with the lowest price; None if there is no price."""
        return self.places[0] if self.places else None

    @property
    def usd_per_hour(self) -> float | None:
        """The lowest price of one node."""
        return self.places[0].usd_per_hour(self.use_spot) if self.places else None

    def spread(self, use_spot: bool) -> tuple[float, float] | tuple[()]:
        """The lowest and the highest price of its places in a market; empty if there is none."""
        known = [price for place in self.places if (price := place.usd_per_hour(use_spot)) is not None]
        return (min(known), max(known)) if known else ()

    @property
    def regions(self) -> int:
        """The number of regions that offer it."""
        return len({(place.cloud, place.region) for place in self.places})

    def to_json(self) -> dict[str, Any]:
        """The rung as JSON, with every place; `rung_from_json` reads it."""
        return asdict(self)


def rung_from_json(document: Mapping[str, Any]) -> RungPrice:
    """A rung from its JSON.

    Raises:
        KeyError, TypeError: it is not one.
    """
    places = tuple(Place(**place) for place in document["places"])
    return RungPrice(**{**document, "places": places, "remarks": tuple(document["remarks"])})


def saving(usd: float | None, on_demand_usd: float | None) -> float | None:
    """The share that is saved against on-demand, from 0 to 1; negative if it costs more."""
    if usd is None or not on_demand_usd:
        return None
    return 1 - usd / on_demand_usd
