"""The fallback ladder: the machines to request, in order of preference."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.task.gpus import Accelerators

RECOVER = 75
"""The exit code with which our trainer requests a restart. It is the trainer's EXIT_PREEMPTED, but `trainer` cannot be
imported here: that could run a trainer.py of the user's in the working folder."""
_INFRA = re.compile(r"[A-Za-z0-9*][A-Za-z0-9*._:@-]*(/[A-Za-z0-9*][A-Za-z0-9*._:@-]*){0,3}")
CLOUDS = (
    "aws", "azure", "cudo", "do", "fluidstack", "gcp", "hyperbolic", "ibm", "kubernetes", "lambda", "mithril", "nebius",
    "oci", "paperspace", "primeintellect", "runpod", "scp", "seeweb", "shadeform", "slurm", "ssh", "vast", "verda",
    "vsphere", "yotta",
)  # fmt: skip
"""SkyPilot's, by sky/skylet/constants.py (ALL_CLOUDS)."""
# Places without spot instances, by sky/clouds/. Kubernetes has spot if its nodes are labelled for it; an SSH node pool
# is a Kubernetes on one's own machines.
NO_SPOT = (
    "cudo", "do", "fluidstack", "hyperbolic", "lambda", "paperspace", "scp", "seeweb", "shadeform", "slurm", "ssh",
    "vsphere", "yotta",
)  # fmt: skip
OWN_MACHINES = ("kubernetes", "slurm", "ssh")
"""Places without machines rented by the hour, so "on-demand" has no price there."""
STRATEGIES = ("failover", "eager_next_region")


@dataclass(frozen=True)
class Rung:
    """One entry of the ladder."""

    accelerators: Accelerators | None
    use_spot: bool | None
    """None if the place does not distinguish spot from on-demand."""
    infra: str | None

    def to_yaml(self) -> dict[str, Any]:
        """Convert the rung to SkyPilot's YAML."""
        found: dict[str, Any] = {}
        if self.accelerators:
            found["accelerators"] = str(self.accelerators)
        if self.use_spot is not None:
            found["use_spot"] = self.use_spot
        if self.infra:
            found["infra"] = self.infra
        return found


def check_infra(option: str, infra: str) -> str:
    """Check a place in SkyPilot's spelling: cloud[/region[/zone]], k8s[/context], slurm/cluster[/partition].

    Raises:
        UsageError: it is not a place.
    """
    if not _INFRA.fullmatch(infra):
        raise UsageError(f"{option}: {shown(infra)} is not a place like aws, aws/us-east-1 or slurm/cluster/partition")
    cloud = infra.partition("/")[0]
    # A release of SkyPilot may know more clouds, so only a misspelled one is refused.
    if cloud.lower() not in (*CLOUDS, "k8s") and (nearest := did_you_mean(cloud, CLOUDS)):
        raise UsageError(f"{option}: {shown(infra)} is in no cloud that SkyPilot knows.{nearest}")
    return infra


def rungs(
    groups: list[list[Accelerators]],
    *,
    prefer: list[str],
    infra: str | None,
    use_spot: bool,
    on_demand_last: bool,
) -> list[Rung]:
    """Build the ladder: preferred places, the same accelerators anywhere, other accelerators, on-demand last.

    Args:
        groups: Accelerators, the preferred group first; empty: a machine without accelerators.
        prefer: Places to try first with the first group.
        infra: A place that every rung is restricted to.
        use_spot: Whether to request spot instances.
        on_demand_last: Whether to end with the first group on demand.
    """
    for place in prefer:
        if infra and place != infra and not place.startswith(f"{infra}/"):
            raise UsageError(
                f"--prefer {place} is outside --infra {infra}, which restricts every rung. Drop one of them"
            )
    wanted: list[list[Accelerators | None]] = [list(group) for group in groups] or [[None]]
    found = [_rung(kind, use_spot, place) for place in prefer for kind in wanted[0]]
    found += [_rung(kind, use_spot, infra) for group in wanted for kind in group]
    if on_demand_last:
        if not use_spot:
            raise UsageError("--on-demand-last has no effect with --no-use-spot, where every rung is on-demand")
        found += [_rung(kind, False, infra) for kind in wanted[0]]
    return list(dict.fromkeys(found))


def _rung(kind: Accelerators | None, use_spot: bool, infra: str | None) -> Rung:
    cloud = (infra or "").partition("/")[0].lower()
    return Rung(kind, None if cloud in NO_SPOT else use_spot, infra)


def notes(ladder: list[Rung], use_spot: bool) -> list[str]:
    """Note the rungs that cannot be spot although that was requested."""
    places = dict.fromkeys(rung.infra for rung in ladder if use_spot and rung.infra and rung.use_spot is None)
    return [f"Note: {place} has no spot instances, so this entry runs at the on-demand price." for place in places]


def resources(
    ladder: list[Rung], *, strategy: str, recover_on_exit_codes: list[int], max_hourly_cost: float | None
) -> dict[str, Any]:
    """Convert a ladder to SkyPilot's `resources`. `job_recovery` is at the top, because rungs must share it."""
    recovery: dict[str, Any] = {"strategy": strategy.upper()}
    if recover_on_exit_codes:
        recovery["recover_on_exit_codes"] = recover_on_exit_codes
    found: dict[str, Any] = {"job_recovery": recovery}
    if max_hourly_cost is not None:
        found["max_hourly_cost"] = max_hourly_cost
    if len(ladder) == 1:
        return {**found, **ladder[0].to_yaml()}
    return {**found, "ordered": [rung.to_yaml() for rung in ladder]}
