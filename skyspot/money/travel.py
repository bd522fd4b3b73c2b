"""The ladder's prices as they travel with a task, for the trainer that reckons with them (trainer/attempt/price.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from skyspot.errors import UsageError
from skyspot.money.offers import asks
from skyspot.money.prices import CUT, UNKNOWN, Place, RungPrice
from skyspot.money.pricing import price_ladder, read_market
from skyspot.task import document, emitter, limits, pipeline, settings
from skyspot.task.document import Task
from skyspot.task.options import MAX_SPEND
from skyspot.task.stated_prices import StatedPrice
from skyspot.wording import first_few

_OPTION = "--max-spend"
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*")
LARGEST = 48_000
"""Characters of the prices of one task; Linux takes 128 KiB in one variable."""


def travelling(rungs: Sequence[RungPrice]) -> str:
    """The prices of a ladder as JSON for the trainer; empty if no rung has one.

    Prices of many zones are cut to those of their regions, the dearest of each, and then to those of clouds. Zones that
    are known by AWS's ids alone are cut to their regions at once: an attempt records a zone's name.
    """
    text = ""
    for parts in (3, 2, 1):
        listed = [_rung(rung, parts) for rung in rungs if rung.places]
        text = json.dumps(listed, separators=(",", ":")) if listed else ""
        if len(text) <= LARGEST:
            break
    return text.replace("'", "")


def _rung(rung: RungPrice, parts: int) -> dict[str, Any]:
    zones: dict[tuple[str | None, ...], Place] = {}
    for place in rung.places:  # The cheapest first: of several instance types in a zone, SkyPilot takes that one.
        zones.setdefault((place.cloud, place.region, place.zone), place)
    places: dict[str, Place] = {}
    for zone, place in zones.items():  # The dearest one in a name stays.
        kept = zone[: min(parts, 2) if place.has_zone_id else parts]
        places["/".join(part for part in kept if part)] = place
    on_demand = [usd for place in rung.places if (usd := place.on_demand_usd_per_hour) is not None]
    return {
        "rung": rung.number,
        "spot": rung.use_spot,
        "machines": rung.accelerators.split(" or "),
        "on_demand": max([*on_demand, rung.on_demand_usd_per_hour or 0.0]) or None,
        "places": {
            name: [place.usd_per_hour(rung.use_spot), place.on_demand_usd_per_hour]
            + ([place.instance_type] if place.instance_type and parts == 3 and not place.has_zone_id else [])
            for name, place in places.items()
        },
    }


def with_prices(text: str, ladders: Sequence[Sequence[RungPrice]]) -> str:
    """Put the prices of each task into its envs, if it starts what reckons with them, and check its limits.

    Args:
        text: A task YAML.
        ladders: The rungs of each of its tasks, with prices.

    Raises:
        UsageError: a task has a limit that cannot be held: nothing in it holds limits, or a price is not known.
    """
    found = pipeline.split(text)
    for number, rungs in zip(found.tasks, ladders, strict=True):
        task = document.read(found.documents[number]).tasks[0]
        check(task, rungs)
        if limits.keeps_records(task) and (prices := travelling(rungs)):
            found = found.edited(number, partial(limits.with_prices, prices=prices))
    return found.text


def check(task: Task, rungs: Sequence[RungPrice]) -> None:
    """Refuse a limit that cannot be held.

    Raises:
        UsageError: nothing in the task holds limits, or the price of a rung is not known; names the remedy.
    """
    spend, deadline = limits.limits_of(task)
    if spend is None and deadline is None:
        return
    if why := limits.unheld(task):
        raise UsageError(f"{limits.DEADLINE if spend is None else MAX_SPEND} is set, but {why}")
    unknown = [rung for rung in rungs if rung.status == UNKNOWN]
    if spend is not None and (unknown or not any(rung.places for rung in rungs)):
        which = unknown or [rung for rung in rungs if rung.status != CUT]
        if not which:
            raise UsageError(f"{_OPTION}: no rung of this task is left: {rungs[0].why}. Raise max_hourly_cost")
        named = first_few([str(rung.number) for rung in which], 5)
        why = which[0].why or which[0].accelerators
        remedy = _remedy([(task.rungs[rung.number - 1], rung.where) for rung in which])
        raise UsageError(
            f"{_OPTION}: the price of rung{'s' if len(which) > 1 else ''} {named} is unknown ({why}){remedy}"
        )


def _remedy(rungs: Sequence[tuple[document.Rung, str]]) -> str:
    """The entries of skyspot.yaml that state the prices of rungs; empty where no entry can.

    Args:
        rungs: Each rung, and the place that it is restricted to.
    """
    entries: dict[str, str] = {}
    for rung, where in rungs:
        for ask in asks(rung)[0]:
            machine = f"accelerators: '{ask.machine}'" if ask.accelerator else ""
            if ask.instance_type:
                machine = f"instance_type: {_plain(ask.instance_type)}"
            place = f"infra: {_plain(where)}" if where else ""
            key = ", ".join(part for part in (machine, place) if part)
            # An on-demand rung needs no price of spot; a spot rung of the same machine does.
            entries[key] = "spot: 8, on_demand: 16" if rung.use_spot else entries.get(key, "on_demand: 16")
    listed = [f"{{{key}{', ' if key else ''}{usd}}}" for key, usd in entries.items()]
    return f". State it in skyspot.yaml, like prices: [{', '.join(listed)}]" if listed else ""


def _plain(text: str) -> str:
    """A text as YAML, quoted where it has to be."""
    return text if _PLAIN.fullmatch(text) else emitter.quoted(text)


def zone_note(rungs: Sequence[RungPrice]) -> str:
    """A note where zones are known by their ids alone, so that the dearest price of a region counts; else empty."""
    ids = [place.zone for rung in rungs if rung.use_spot for place in rung.places if place.has_zone_id]
    if not ids:
        return ""
    return (
        f"The catalog of aws has zone ids here ({ids[0]}), not your account's names (us-east-1a), so an attempt counts "
        "at its region's dearest spot price. SkyPilot learns the names once AWS credentials are on this machine."
    )


def priced(text: str, folder: Path) -> str:
    """A task YAML with the prices that are known on this machine, as of `with_prices`."""
    tasks = document.read(text).tasks
    stated: Sequence[StatedPrice] = settings.stated_prices(folder)
    market = read_market(tasks, stated)
    return with_prices(text, [price_ladder(task, market) for task in tasks])
