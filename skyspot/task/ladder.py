"""The fallback ladder: what to ask for first, and what when that is not to be had."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from skyspot.errors import UsageError, shown
from skyspot.task.gpus import Accelerators

RECOVER = 75
"""The exit code with which our trainer asks to be started again; it has no such meaning to other programs."""
_INFRA = re.compile(r"[A-Za-z0-9*][A-Za-z0-9*._:@-]*(/[A-Za-z0-9*][A-Za-z0-9*._:@-]*){0,3}")
# No spot market, says sky/clouds/ of each. Kubernetes has one where its nodes are labelled for it; an SSH node pool is
# a Kubernetes of one's own machines.
NO_SPOT = (
    "cudo", "do", "fluidstack", "hyperbolic", "lambda", "paperspace", "scp", "seeweb", "shadeform", "slurm", "ssh",
    "vsphere", "yotta",
)  # fmt: skip
OWN_MACHINES = ("kubernetes", "slurm", "ssh")
"""No machine of these is rented by the hour, so that "on-demand" has no price there."""
STRATEGIES = ("failover", "eager_next_region")


@dataclass(frozen=True)
class Rung:
    """One entry of the ladder."""

    accelerators: Accelerators | None
    use_spot: bool | None
    """None where the place knows no difference."""
    infra: str | None

    def to_yaml(self) -> dict[str, Any]:
        """The rung in SkyPilot's words."""
        found: dict[str, Any] = {}
        if self.accelerators:
            found["accelerators"] = str(self.accelerators)
        if self.use_spot is not None:
            found["use_spot"] = self.use_spot
        if self.infra:
            found["infra"] = self.infra
        return found


def check_infra(option: str, infra: str) -> str:
    """A place in SkyPilot's spelling: cloud[/region[/zone]], k8s[/context], slurm/cluster[/partition].

    Raises:
        UsageError: it is not one.
    """
    if not _INFRA.fullmatch(infra):
        raise UsageError(f"{option}: {shown(infra)} is not a place like aws, aws/us-east-1 or slurm/cluster/partition")
    return infra


def rungs(
    groups: list[list[Accelerators]],
    *,
    prefer: list[str],
    infra: str | None,
    use_spot: bool,
    on_demand_last: bool,
) -> list[Rung]:
    """The ladder: preferred places, the same accelerators anywhere, the other accelerators, on-demand last.

    Args:
        groups: Accelerators, the preferred group first; empty: a machine without.
        prefer: Places to try first with the first group.
        infra: Restricts every rung to a place.
        use_spot: Whether to ask for machines that may be reclaimed.
        on_demand_last: Whether to end on the first group without spot.
    """
    for place in prefer:
        if infra and place != infra and not place.startswith(f"{infra}/"):
            raise UsageError(
                f"--prefer {place} lies outside of --infra {infra}, which restricts every rung: leave one out"
            )
    wanted: list[list[Accelerators | None]] = [list(group) for group in groups] or [[None]]
    found = [_rung(kind, use_spot, place) for place in prefer for kind in wanted[0]]
    found += [_rung(kind, use_spot, infra) for group in wanted for kind in group]
    if on_demand_last:
        if not use_spot:
            raise UsageError("--on-demand-last means nothing beside --no-use-spot: every rung is on-demand already")
        found += [_rung(kind, False, infra) for kind in wanted[0]]
    return list(dict.fromkeys(found))


def _rung(kind: Accelerators | None, use_spot: bool, infra: str | None) -> Rung:
    cloud = (infra or "").partition("/")[0].lower()
    return Rung(kind, None if cloud in NO_SPOT else use_spot, infra)


def notes(ladder: list[Rung], use_spot: bool) -> list[str]:
    """What a ladder cannot give, though it was asked for."""
    places = dict.fromkeys(rung.infra for rung in ladder if use_spot and rung.infra and rung.use_spot is None)
    return [f"Note: {place} has no spot market: that rung is taken for what it costs there." for place in places]


def resources(
    ladder: list[Rung], *, strategy: str, recover_on_exit_codes: list[int], max_hourly_cost: float | None
) -> dict[str, Any]:
    """SkyPilot's `resources` for a ladder. `job_recovery` stands once, at the top: rungs may not differ in it."""
    recovery: dict[str, Any] = {"strategy": strategy.upper()}
    if recover_on_exit_codes:
        recovery["recover_on_exit_codes"] = recover_on_exit_codes
    found: dict[str, Any] = {"job_recovery": recovery}
    if max_hourly_cost is not None:
        found["max_hourly_cost"] = max_hourly_cost
    if len(ladder) == 1:
        return {**found, **ladder[0].to_yaml()}
    return {**found, "ordered": [rung.to_yaml() for rung in ladder]}
