"""What a rung asks for, and the rows of a catalog that offer it, as SkyPilot finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skyspot.money import gcp
from skyspot.money.catalog import Row
from skyspot.money.sizes import FAMILIES, default_instance_type, fits
from skyspot.task.document import Rung
from skyspot.task.gpus import NAMES

_CANONICAL = {name.lower(): name for name in NAMES}


@dataclass(frozen=True)
class Ask:
    """One kind of machine that a rung accepts."""

    accelerator: str | None
    """None: none is asked for."""
    count: float
    instance_type: str | None
    cpus: str | None
    memory: str | None
    cloud: str | None
    """None: any."""
    region: str | None
    zone: str | None

    @property
    def machine(self) -> str:
        """The machine as a person would name it: `A100:8`, an instance type, or `CPU`."""
        accelerators = f"{self.accelerator}:{self.count:g}" if self.accelerator else None
        return accelerators or self.instance_type or "CPU"

    def is_here(self, row: Row) -> bool:
        """True if a row is in the place that is asked for."""
        return (self.region is None or row.region.lower() == self.region.lower()) and (
            self.zone is None or (row.zone or "").lower() == self.zone.lower()
        )


def asks(rung: Rung) -> tuple[list[Ask], list[str]]:
    """The machines that a rung accepts, and those that cannot be looked up in a catalog (requests by memory)."""
    cloud, region, zone = _place(rung)
    values = rung.values
    base = Ask(
        accelerator=None, count=0, instance_type=_text(values.get("instance_type")), cpus=_text(values.get("cpus")),
        memory=_text(values.get("memory")), cloud=cloud, region=region, zone=zone,
    )  # fmt: skip
    found: list[Ask] = []
    unknown: list[str] = []
    for text, _ in rung.accelerators:
        name, _, count = text.partition(":")
        name = name.strip()
        if not name or name[0].isdigit() or not _is_count(count):
            unknown.append(text)
        else:
            found.append(
                replace(base, accelerator=_CANONICAL.get(name.lower(), name), count=float(count) if count else 1.0)
            )
    return (found or ([] if unknown else [base])), unknown


def _is_count(text: str) -> bool:
    try:
        return not text or 0 < float(text) < 1e6
    except ValueError:
        return False


def _text(value: Any) -> str | None:
    """A size as text; SkyPilot also accepts `32GB` for a memory."""
    if value is None:
        return None
    text = str(value).strip()
    return text[:-2] if text.upper().endswith("GB") else text


def _place(rung: Rung) -> tuple[str | None, str | None, str | None]:
    values = rung.values
    if values.get("infra"):
        parts = [None if part in ("", "*") else part for part in str(values["infra"]).split("/")[1:3]]
        region, zone = [*parts, None, None][:2]
        return rung.cloud, region, zone
    return rung.cloud, _text(values.get("region")), _text(values.get("zone"))


def names_of(cloud: str, machines: Iterable[Ask]) -> set[str] | None:
    """What the rows of these machines are called in a cloud's catalog; None: all of them have to be read."""
    found: set[str] = set()
    for ask in machines:
        accelerator, count = ask.accelerator, ask.count
        if ask.instance_type:
            found.add(ask.instance_type)
            accelerator, count = (cloud == "gcp" and gcp.accelerators_of(ask.instance_type)) or (accelerator, count)
        elif not accelerator:
            if not (begins := FAMILIES.get(cloud)):
                return None
            found.update(begins)
        if accelerator:
            found.add(accelerator)
            if cloud == "gcp" and not ask.instance_type:
                found.update(gcp.wanted_with(accelerator, count))
    return found


def offers(cloud: str, ask: Ask, rows: Sequence[Row], *, use_spot: bool, limit: float | None) -> list[Row]:
    """The rows of the machines that SkyPilot would take for an ask, with the prices of whole machines.

    Args:
        cloud: The catalog's cloud.
        ask: What is asked for.
        rows: The catalog's.
        use_spot: Whether the rung is spot.
        limit: The rung's max_hourly_cost, where SkyPilot applies it; None: none.
    """
    if ask.instance_type or not ask.accelerator:
        return _of_type(cloud, ask, rows, use_spot=use_spot, limit=limit)
    if cloud == "gcp":
        # SkyPilot ignores max_hourly_cost here: get_instance_type_for_accelerator() in sky/catalog/gcp_catalog.py
        # goes on with an empty list, and gives up on None alone.
        return _on_gcp(ask, rows, gcp.host_of(rows, ask.accelerator, ask.count, ask.cpus, ask.memory))
    found = [row for row in rows if _has(row, ask) and ask.is_here(row) and fits(row, ask.cpus, ask.memory)]
    if limit is None:
        return found
    # The limit filters instance types by their cheapest row in the asked place, and keeps all rows of a type.
    prices = [(row.instance_type, row.spot if use_spot else row.on_demand) for row in found]
    kept = {name for name, price in prices if price is not None and price <= limit}
    return [row for row in found if row.instance_type in kept]


def _has(row: Row, ask: Ask) -> bool:
    """True if a row has the accelerators (get_instance_type_for_accelerator_impl() in sky/catalog/common.py)."""
    assert ask.accelerator
    return abs(row.number - ask.count) <= 0.01 and row.accelerator.lower() == ask.accelerator.lower()


def _of_type(cloud: str, ask: Ask, rows: Sequence[Row], *, use_spot: bool, limit: float | None) -> list[Row]:
    """The rows of a named instance type, which no limit cuts off, or of the default one without accelerators."""
    here = [row for row in rows if ask.is_here(row)]
    name = ask.instance_type
    if name is None:
        if cloud not in FAMILIES:
            return []
        name = default_instance_type(cloud, here, ask.cpus, ask.memory, use_spot=use_spot, limit=limit)
    elif cloud == "gcp":
        accelerators = (ask.accelerator, ask.count) if ask.accelerator else gcp.accelerators_of(name)
        if accelerators:
            return _on_gcp(replace(ask, accelerator=accelerators[0], count=accelerators[1]), rows, name)
    return [row for row in here if row.instance_type == name]


def _on_gcp(ask: Ask, rows: Sequence[Row], host: str | None) -> list[Row]:
    if host is None:
        return []
    hosts = {(row.region, row.zone): row for row in rows if row.instance_type == host}
    found = [row for row in rows if _has(row, ask) and ask.is_here(row)]
    return [whole for row in found if (whole := gcp.with_host(row, host, hosts))]


def counts_of(accelerator: str, rows: Iterable[Row]) -> list[float]:
    """The numbers in which a catalog has an accelerator."""
    return sorted({row.number for row in rows if row.accelerator.lower() == accelerator.lower() and row.number})
