"""Sizes of machines as SkyPilot filters them: `cpus` and `memory` of a rung, and what it takes without accelerators."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from skyspot.money.catalog import Row

_AWS = ("m6i.", "m6id.", "m7i.", "r6i.", "r6id.", "r7i.", "c6i.", "c6id.", "c7i.")
_GCP = ("n2-standard-", "n2-highmem-", "n2-highcpu-", "n4-standard-", "n4-highcpu-", "n4-highmem-")
FAMILIES: dict[str, tuple[str, ...]] = {
    "aws": _AWS,
    "gcp": _GCP,
    "azure": ("Standard_D", "Standard_E", "Standard_F"),
    "lambda": (),
    "runpod": (),
}
"""The clouds whose machine for a rung without accelerators is known, and how its instance type begins; empty: in any
way. _DEFAULT_INSTANCE_FAMILY in sky/catalog/*_catalog.py."""
_AZURE = re.compile(r"Standard_(?:[DE]\d+s_v5|F\d+s_v2)(?:_Promo)?")
_CPUS = {"aws": "8+", "gcp": "8+", "azure": "8+", "lambda": "30+"}
_MEMORY = "4x"
"""GiB for each CPU where neither is asked for; RunPod has no default."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([+x]?)")


def fits(row: Row, cpus: str | None, memory: str | None) -> bool:
    """True if a machine has the asked size, like `8`, `8+`, `4x` (GiB per CPU; memory only) or None for any."""
    return _fits(row.cpus, cpus, None) and _fits(row.memory_gib, memory, row.cpus)


def size_of(asked: str) -> float | None:
    """The number of a size, without its `+` or `x`; None: it is no size."""
    found = _SIZE.fullmatch(asked)
    return float(found[1]) if found else None


def _fits(has: float | None, asked: str | None, cpus: float | None) -> bool:
    if asked is None:
        return True
    found = _SIZE.fullmatch(asked)
    if not found or has is None:
        return False
    number = float(found[1])
    if found[2] == "x":
        return cpus is not None and has >= number * cpus
    return has >= number if found[2] else has == number


def cheapest_of_size(
    rows: Iterable[Row], cpus: str | None, memory: str | None, *, by_spot: bool = False, limit: float | None = None
) -> str | None:
    """The instance type of the cheapest row of a size (get_instance_type_for_cpus_mem_impl() in sky/catalog/common.py).

    Args:
        rows: The candidates.
        cpus: As in a task YAML; None: any.
        memory: As in a task YAML; None: any.
        by_spot: Whether to compare spot prices.
        limit: Leave out rows that cost more, in USD an hour.
    """
    priced = [
        (price, row.instance_type)
        for row in rows
        if (price := row.spot if by_spot else row.on_demand) is not None
        and (limit is None or price <= limit)
        and fits(row, cpus, memory)
    ]
    return min(priced, key=lambda one: one[0])[1] if priced else None


def default_instance_type(
    cloud: str, rows: Sequence[Row], cpus: str | None, memory: str | None, *, use_spot: bool, limit: float | None
) -> str | None:
    """The instance type that SkyPilot takes for a rung without accelerators (get_default_instance_type()).

    Args:
        cloud: One of FAMILIES.
        rows: Its rows in the asked place.
        cpus: As in a task YAML; None: the cloud's default.
        memory: As in a task YAML; None: 4 GiB for each CPU.
        use_spot: Whether the rung is spot; spot prices are compared only beside a limit.
        limit: The rung's max_hourly_cost.
    """
    begins = FAMILIES[cloud]
    fitting = [row for row in rows if not begins or row.instance_type.startswith(begins)]
    if cloud == "azure":
        fitting = [row for row in fitting if _AZURE.fullmatch(row.instance_type)]
    if cpus is None and memory is None:
        cpus = _CPUS.get(cloud)
    if memory is None and cloud in _CPUS:
        memory = _MEMORY
    return cheapest_of_size(fitting, cpus, memory, by_spot=use_spot and limit is not None, limit=limit)
