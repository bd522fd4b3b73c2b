"""The place of this machine, as SkyPilot and the driver name it, for the attempt's record. Standard library only."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

_DRIVER = Path("/proc/driver/nvidia/gpus")
_MAX_CHARACTERS = 100


def place() -> dict[str, Any]:
    """Where this machine is, and what it has; without what is not known.

    Keys: cloud, region, zone and cluster, as SkyPilot names them; nodes and accelerators_per_node, as numbers;
    accelerator, as the driver names it.
    """
    found: dict[str, Any] = {}
    with suppress(ValueError):
        info = json.loads(os.environ.get("SKYPILOT_CLUSTER_INFO", "{}"))
        named = {"cloud": "cloud", "region": "region", "zone": "zone", "cluster": "cluster_name"}
        if isinstance(info, dict):
            found = {key: str(info[name])[:_MAX_CHARACTERS] for key, name in named.items() if info.get(name)}
    for key, name in (("nodes", "SKYPILOT_NUM_NODES"), ("accelerators_per_node", "SKYPILOT_NUM_GPUS_PER_NODE")):
        with suppress(KeyError, ValueError):
            found[key] = int(os.environ[name])
    if model := _accelerator():
        found["accelerator"] = model
    return found


def _accelerator() -> str | None:
    """The model of this machine's first NVIDIA accelerator, without its driver's library; None if there is none."""
    with suppress(OSError):
        for folder in sorted(_DRIVER.iterdir()):
            for line in (folder / "information").read_text(encoding="ascii", errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name.strip() == "Model" and value.strip():
                    return value.strip()[:_MAX_CHARACTERS]
    return None
