"""Puts prices on the rungs of a task: from SkyPilot's catalogs, and from skyspot.yaml where it states them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from skyspot.money.catalog import Catalog, Row, clouds_here, enabled_clouds, read_catalog
from skyspot.money.offers import Ask, asks, counts_of, names_of, offers
from skyspot.money.prices import CUT, NEVER, OFFERED, UNKNOWN, Place, Price, RungPrice
from skyspot.money.sizes import FAMILIES
from skyspot.task.document import Rung, Task
from skyspot.task.ladder import OWN_MACHINES
from skyspot.task.stated_prices import StatedPrice
from skyspot.wording import first_few

MAX_NAMES = 6
"""Clouds named in a reason; the others are counted."""
_STATE_IT = "state its price in skyspot.yaml (`prices`)"


@dataclass(frozen=True)
class Market:
    """The catalogs of this machine that a task needs."""

    catalogs: Mapping[str, Catalog]
    """By cloud."""
    clouds: tuple[str, ...]
    """Where a rung without a place can be: the enabled clouds with a catalog, or all with one."""
    is_enabled: bool
    """True if `clouds` are those that SkyPilot has enabled; False: that is unknown here."""
    stated: tuple[StatedPrice, ...]

    @property
    def problems(self) -> list[str]:
        """What is wrong with the catalogs."""
        return [problem for catalog in self.catalogs.values() for problem in catalog.problems]


def read_market(tasks: Iterable[Task], stated: Sequence[StatedPrice]) -> Market:
    """Read what the rungs of some tasks may need from the catalogs on this machine."""
    here = clouds_here()
    enabled = enabled_clouds()
    anywhere = tuple(cloud for cloud in here if enabled is None or cloud in enabled)
    wanted: dict[str, list[Ask]] = {}
    for task in tasks:
        for rung in task.rungs:
            for ask in asks(rung)[0]:
                for cloud in [ask.cloud] if ask.cloud else anywhere:
                    wanted.setdefault(cloud, []).append(ask)
    read = {cloud: read_catalog(cloud, names_of(cloud, machines)) for cloud, machines in wanted.items()}
    catalogs = {cloud: catalog for cloud, catalog in read.items() if catalog}
    return Market(catalogs, anywhere, enabled is not None, tuple(stated))


def price_ladder(task: Task, market: Market) -> tuple[RungPrice, ...]:
    """Each rung of a task with its prices, in the ladder's order."""
    return tuple(_priced(number, rung, task.num_nodes, market) for number, rung in enumerate(task.rungs, 1))


def first_stated(task: Task, stated: Sequence[StatedPrice]) -> Price | None:
    """The price of a node of the first rung whose price skyspot.yaml states; None: it states none for this task."""
    for rung in price_ladder(task, Market({}, (), True, tuple(stated))):
        if rung.cheapest and rung.usd_per_hour is not None:
            on_demand = rung.cheapest.on_demand_usd_per_hour
            return Price(rung.usd_per_hour, on_demand, f"skyspot.yaml, rung {rung.number}: {rung.accelerators}")
    return None


@dataclass(frozen=True)
class _Found:
    """What the catalogs have for a rung."""

    kept: list[Place]
    """After the limit."""
    all: list[Place]
    rows: list[Row]
    """The rows of the clouds that were searched, for reasons."""
    clouds: list[str]
    free: int
    """Places whose price is 0."""


def _priced(number: int, rung: Rung, nodes: int, market: Market) -> RungPrice:
    machines, unknown = asks(rung)
    limit = _limit(rung)
    found = _search(machines, market, rung.use_spot, limit)
    spot = rung.use_spot
    places = _sorted([place for place in found.kept if place.usd_per_hour(spot) is not None], spot)
    status, why = OFFERED, ""
    if not places:
        cut = _sorted([place for place in found.all if place.usd_per_hour(spot) is not None], spot)
        status, why = (CUT, _cut(cut[0], spot, limit)) if cut else _missing(rung, machines, unknown, found, market)
    on_demand = [usd for place in found.all if (usd := place.on_demand_usd_per_hour) is not None]
    words = [ask.machine for ask in machines] + unknown
    remarks = _remarks(places, found, spot, limit) + [f"{text} is not looked up: it names no accelerator."
                                                      for text in unknown if places]  # fmt: skip
    return RungPrice(
        number=number, accelerators=" or ".join(words), where=rung.place, use_spot=spot, nodes=nodes,
        places=tuple(places), on_demand_usd_per_hour=min(on_demand, default=None),
        limit_usd_per_hour=limit, status=status, why=why, remarks=tuple(remarks),
    )  # fmt: skip


def _limit(rung: Rung) -> float | None:
    found = rung.max_hourly_cost
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _search(machines: Sequence[Ask], market: Market, use_spot: bool, limit: float | None) -> _Found:
    found, free = _Found([], [], [], [], 0), 0
    for ask in machines:
        stated = [price for price in market.stated if _is_for(price, ask)]
        catalogs: list[Place] = []
        for cloud in [ask.cloud] if ask.cloud else market.clouds:
            catalog = market.catalogs.get(cloud)
            if not catalog or (not catalog.rows and catalog.problems):
                continue
            found.clouds.append(cloud)
            found.rows.extend(catalog.rows)
            rows = offers(cloud, ask, catalog.rows, use_spot=use_spot, limit=None)
            free += sum(row.on_demand == 0 or row.spot == 0 for row in rows)
            catalogs += [_place(cloud, row) for row in rows]
            found.all.extend(_beside_stated(cloud, rows, stated, use_spot))
            if limit is not None:
                rows = offers(cloud, ask, catalog.rows, use_spot=use_spot, limit=limit)
            found.kept.extend(_beside_stated(cloud, rows, stated, use_spot))
        for price in stated:
            if _in_market(price, use_spot) is None and any(_covers(price, place) for place in catalogs):
                continue  # The catalog's places stay, with this price in the other market.
            place = _stated_place(price, ask, stated, catalogs)
            usd = place.usd_per_hour(use_spot)
            found.all.append(place)
            # SkyPilot cannot compare a price that only skyspot.yaml has; skyspot does, like SkyPilot.
            if limit is None or usd is None or usd <= limit:
                found.kept.append(place)
    return _Found(found.kept, found.all, found.rows, list(dict.fromkeys(found.clouds)), free)


def _place(cloud: str, row: Row) -> Place:
    return Place(cloud, row.region, row.zone, row.instance_type, row.spot or None, row.on_demand or None)


def _is_for(price: StatedPrice, ask: Ask) -> bool:
    """True if a stated price is for a machine that is asked for, in a place that is asked for."""
    if price.instance_type is not None:
        same = price.instance_type == ask.instance_type
    elif price.accelerator is not None:
        same = ask.accelerator is not None and price.accelerator.lower() == ask.accelerator.lower()
        same = same and price.count == ask.count
    else:
        same = ask.accelerator is None and ask.instance_type is None
    pairs = ((price.cloud, ask.cloud), (price.region, ask.region), (price.zone, ask.zone))
    return same and all(_agree(one, other) for one, other in pairs)


def _agree(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one.lower() == other.lower()


def _stated_place(price: StatedPrice, ask: Ask, stated: Sequence[StatedPrice], catalogs: Sequence[Place]) -> Place:
    """The place of a stated price; a market that it does not state has another entry's price, or the catalogs'."""
    place = Place(
        cloud=price.cloud or ask.cloud or "", region=price.region or ask.region, zone=price.zone or ask.zone,
        instance_type=ask.instance_type or price.instance_type or "",
        spot_usd_per_hour=price.spot, on_demand_usd_per_hour=price.on_demand,
    )  # fmt: skip
    for use_spot in (True, False):
        if _in_market(price, use_spot) is None:
            own = [one.usd_per_hour(use_spot) for one in catalogs if _covers(price, one)]
            known = [usd for usd in own if usd is not None]
            place = _with_usd(place, use_spot, _stated_usd(stated, place, use_spot) or min(known, default=None))
    return place


def _beside_stated(cloud: str, rows: Iterable[Row], stated: Sequence[StatedPrice], use_spot: bool) -> list[Place]:
    """The places of a catalog whose price in a market is not stated, with the stated price in the other market."""
    places = [_place(cloud, row) for row in rows]
    return [
        _with_usd(place, not use_spot, usd) if (usd := _stated_usd(stated, place, not use_spot)) else place
        for place in places
        if _stated_usd(stated, place, use_spot) is None
    ]


def _stated_usd(stated: Sequence[StatedPrice], place: Place, use_spot: bool) -> float | None:
    """The price in a market that skyspot.yaml states for a place, or for the place around it: the narrowest entry's."""
    found = [price for price in stated if _covers(price, place) and _in_market(price, use_spot) is not None]
    widths = [[price.cloud, price.region, price.zone].count(None) for price in found]
    return _in_market(found[widths.index(min(widths))], use_spot) if found else None


def _covers(price: StatedPrice, place: Place) -> bool:
    """True if a stated price is for a place, or for the place around it."""
    return (
        (price.cloud is None or price.cloud == place.cloud)
        and (price.region is None or price.region.lower() == (place.region or "").lower())
        and (price.zone is None or price.zone.lower() == (place.zone or "").lower())
    )


def _in_market(price: StatedPrice, use_spot: bool) -> float | None:
    return price.spot if use_spot else price.on_demand


def _with_usd(place: Place, use_spot: bool, usd: float | None) -> Place:
    return replace(place, spot_usd_per_hour=usd) if use_spot else replace(place, on_demand_usd_per_hour=usd)


def _sorted(places: Iterable[Place], use_spot: bool) -> list[Place]:
    """The cheapest first; each place and instance type once."""
    once: dict[tuple[str, str], Place] = {}
    keyed = [((one.usd_per_hour(use_spot) or 0.0, one.infra, one.instance_type), one) for one in places]
    for (_, infra, kind), place in sorted(keyed, key=lambda one: one[0]):
        once.setdefault((infra, kind), place)
    return list(once.values())


def _cut(cheapest: Place, use_spot: bool, limit: float | None) -> str:
    return f"max_hourly_cost {limit:g} cuts it off: its cheapest place costs {cheapest.usd_per_hour(use_spot):.2f}"


def _missing(
    rung: Rung, machines: Sequence[Ask], unknown: Sequence[str], found: _Found, market: Market
) -> tuple[str, str]:
    """The status of a rung without a price, and the reason."""
    if rung.cloud in OWN_MACHINES:
        return UNKNOWN, f"{rung.cloud} is no rented machine with a listed price; {_STATE_IT}"
    if unknown and not machines:
        return UNKNOWN, f"{' or '.join(unknown)} names no accelerator to look up; name one"
    if not found.clouds:
        names = first_few([rung.cloud] if rung.cloud else list(market.clouds), MAX_NAMES)
        if rung.cloud not in market.catalogs and (rung.cloud or not market.clouds):
            return UNKNOWN, f"no price catalog{f' of {rung.cloud}' if rung.cloud else ''} is on this machine"
        return UNKNOWN, f"the price catalog of {names} cannot be read"
    where = first_few(found.clouds, MAX_NAMES)
    if found.all:
        market_name = "as spot" if rung.use_spot else "on demand"
        return NEVER, f"not available anywhere: {where} has it, but without a price {market_name}"
    asked = machines[0]
    if asked.accelerator is None and asked.instance_type is None and not FAMILIES.keys() & set(found.clouds):
        return UNKNOWN, f"SkyPilot's choice of a machine without accelerators is not known for {where}; {_STATE_IT}"
    place = f" in {rung.place}" if "/" in rung.place else ""
    sizes = [f"{name}: {size}" for name, size in (("cpus", asked.cpus), ("memory", asked.memory)) if size]
    what = " or ".join(ask.machine for ask in machines) + (f" with {', '.join(sizes)}" if sizes else "")
    counts = counts_of(asked.accelerator, found.rows) if asked.accelerator and not asked.instance_type else []
    others = f" ({asked.accelerator} comes in {', '.join(f'{count:g}' for count in counts)})" if (
        counts and asked.count not in counts) else ""  # fmt: skip
    return NEVER, f"not available anywhere: no catalog of {where} offers {what}{place}{others}"


def _remarks(places: Sequence[Place], found: _Found, use_spot: bool, limit: float | None) -> list[str]:
    said = []
    count = len(places)
    prices = [price for place in places if (price := place.usd_per_hour(use_spot)) is not None]
    over = sum(price > limit for price in prices) if limit is not None else 0
    if limit is not None and over:
        said.append(
            f"max_hourly_cost {limit:g} does not hold in {over} of {count} places: SkyPilot compares it with an "
            "instance type's cheapest zone, and on Google Cloud not at all."
        )
    if use_spot:
        dear = sum((place.on_demand_usd_per_hour or 1e9) <= (place.spot_usd_per_hour or 0) for place in places)
        if dear:
            said.append(f"In {dear} of {count} places spot costs as much as on-demand, or more.")
        without = len({place.infra for place in found.all if place.spot_usd_per_hour is None})
        if without and places:
            said.append(f"{without} more {'place has' if without == 1 else 'places have'} no spot price.")
    if found.free:
        zeros = "1 price of 0 in the catalog is" if found.free == 1 else f"{found.free} prices of 0 in the catalog are"
        said.append(f"{zeros} taken as unknown.")
    return said
