"""Prices that a user states in skyspot.yaml, for places without a catalog or with a contract of one's own.

prices:
  - {accelerators: "A100:8", infra: aws/us-east-1, spot: 9.83, on_demand: 32.77}
  - {accelerators: "H100:8", infra: slurm/my-cluster, on_demand: 16}
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.task.ladder import check_infra

_KEYS = ("accelerators", "instance_type", "infra", "spot", "on_demand")
_ACCELERATORS = re.compile(r"([A-Za-z][A-Za-z0-9 ._-]*?)(?::(\d{1,4}(?:\.\d+)?))?")


@dataclass(frozen=True)
class StatedPrice:
    """A price of skyspot.yaml, in USD an hour for one node."""

    accelerator: str | None
    """None: any machine without accelerators, or the instance type."""
    count: float
    instance_type: str | None
    cloud: str | None
    """None: everywhere."""
    region: str | None
    zone: str | None
    spot: float | None
    on_demand: float | None


def read_stated(where: str, value: Any) -> tuple[StatedPrice, ...]:
    """Check the `prices` of skyspot.yaml.

    Args:
        where: The file's name, for errors.
        value: Its value.

    Raises:
        UsageError: it is not a list of prices; names the entry, from 1, and the reason.
    """
    if not isinstance(value, list):
        raise UsageError(f"{where}: prices: expected a list of entries like {{accelerators: 'A100:8', spot: 9.83}}")
    return tuple(_read(f"{where}: prices, entry {number}", entry) for number, entry in enumerate(value, 1))


def _read(where: str, entry: Any) -> StatedPrice:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected keys and values, like {{accelerators: 'A100:8', spot: 9.83}}")
    for key in entry:
        if key not in _KEYS:
            raise UsageError(f"{where}: unknown key {shown(str(key))}.{did_you_mean(str(key), _KEYS)}")
    name, count = _accelerators(where, entry.get("accelerators"))
    kind = entry.get("instance_type")
    if kind is not None and (name or not isinstance(kind, str) or not kind):
        raise UsageError(f"{where}: instance_type: give one name, and no accelerators beside it")
    infra = entry.get("infra")
    if infra is not None and not isinstance(infra, str):
        raise UsageError(f"{where}: infra: {shown(str(infra))} is not a place like aws/us-east-1")
    parts = [*check_infra(f"{where}: infra", infra).split("/"), "", ""] if infra else ["", "", ""]
    cloud = {"k8s": "kubernetes", "*": ""}.get(parts[0].lower(), parts[0].lower())
    spot, on_demand = (_usd(where, key, entry.get(key)) for key in ("spot", "on_demand"))
    if spot is None and on_demand is None:
        raise UsageError(f"{where}: state spot or on_demand, in USD an hour for one node")
    region, zone = (None if part in ("", "*") else part for part in parts[1:3])
    return StatedPrice(name, count, kind, cloud or None, region, zone, spot, on_demand)


def _accelerators(where: str, value: Any) -> tuple[str | None, float]:
    if value is None:
        return None, 0.0
    found = _ACCELERATORS.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise UsageError(f"{where}: accelerators: {shown(str(value))} is not NAME:COUNT, like A100:8")
    return found[1], float(found[2] or 1)


def _usd(where: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6 or math.isnan(value):
        raise UsageError(f"{where}: {key}: {shown(str(value))} is not a price in USD an hour")
    return float(value)
