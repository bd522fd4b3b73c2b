"""Google Cloud's machines: the catalog has hosts and accelerators in rows of their own, and their prices add up."""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.money.catalog import Row
from skyspot.money.sizes import cheapest_of_size, size_of

HOSTS: dict[str, dict[float, tuple[str, ...]]] = {
    "A100": {
        1: ("a2-highgpu-1g",), 2: ("a2-highgpu-2g",), 4: ("a2-highgpu-4g",), 8: ("a2-highgpu-8g",),
        16: ("a2-megagpu-16g",),
    },
    "A100-80GB": {1: ("a2-ultragpu-1g",), 2: ("a2-ultragpu-2g",), 4: ("a2-ultragpu-4g",), 8: ("a2-ultragpu-8g",)},
    "L4": {
        1: ("g2-standard-4", "g2-standard-8", "g2-standard-12", "g2-standard-16", "g2-standard-32"),
        2: ("g2-standard-24",), 4: ("g2-standard-48",), 8: ("g2-standard-96",),
    },
    "H100": {1: ("a3-highgpu-1g",), 2: ("a3-highgpu-2g",), 4: ("a3-highgpu-4g",), 8: ("a3-highgpu-8g",)},
    "H100-MEGA": {8: ("a3-megagpu-8g",)},
    "H200": {8: ("a3-ultragpu-8g",)},
    "B200": {8: ("a4-highgpu-8g",)},
    "RTXPRO6000": {1: ("g4-standard-48",), 2: ("g4-standard-96",), 4: ("g4-standard-192",), 8: ("g4-standard-384",)},
}  # fmt: skip
"""_ACC_INSTANCE_TYPE_DICTS in sky/catalog/gcp_catalog.py: accelerator -> count -> its hosts."""
CPUS: dict[str, dict[float, int]] = {
    "K80": {1: 4, 2: 8, 4: 16, 8: 32, 16: 64},
    "V100": {1: 8, 2: 16, 4: 32, 8: 64},
    "T4": {1: 4, 2: 8, 4: 48},
    "P100": {1: 8, 2: 16, 4: 32, 8: 64},
    "": {1: 8, 2: 16, 4: 32, 8: 64, 16: 128},
}
"""_NUM_ACC_TO_NUM_CPU, the CPUs of an N1 host; empty: any other accelerator."""
MEMORY_RATIO = 4
"""_DEFAULT_GPU_MEMORY_CPU_RATIO, in GiB per CPU."""
N1 = ("n1-standard", "n1-highmem", "n1-highcpu")
"""_DEFAULT_HOST_VM_FAMILY."""
TPU_HOST = "TPU-VM"
"""SkyPilot's name for a TPU's host, which costs nothing beside the TPU."""


def wanted_with(accelerator: str, count: float) -> tuple[str, ...]:
    """What the hosts of an accelerator are called in the catalog, beside the accelerator itself."""
    hosts = HOSTS.get(accelerator)
    return hosts.get(count, ()) if hosts else (f"{N1[0].partition('-')[0]}-",)


def accelerators_of(instance_type: str) -> tuple[str, float] | None:
    """The accelerators that belong to an instance type; None: it has none."""
    for name, counts in HOSTS.items():
        for count, hosts in counts.items():
            if instance_type in hosts:
                return name, count
    return None


def host_of(rows: Sequence[Row], accelerator: str, count: float, cpus: str | None, memory: str | None) -> str | None:
    """The host that SkyPilot gives these accelerators in every place; None: there is none.

    It is the cheapest of its size anywhere, whatever the place that is asked for
    (get_instance_type_for_accelerator() in sky/catalog/gcp_catalog.py).
    """
    if accelerator.startswith("tpu-"):
        return TPU_HOST
    if accelerator in HOSTS:
        hosts = HOSTS[accelerator].get(count, ())
        fitting = [row for row in rows if row.instance_type in hosts]
        return cheapest_of_size(fitting, cpus, memory)
    if cpus is None and memory is None:
        number = CPUS.get(accelerator, CPUS[""]).get(count)
        if number is None:
            return None
        cpus = f"{number}+"
    if memory is None and cpus is not None:
        if (size := size_of(cpus)) is None:
            return None
        memory = f"{int(size) * MEMORY_RATIO}+"
    return cheapest_of_size([row for row in rows if row.instance_type.startswith(N1)], cpus, memory)


def with_host(accelerator: Row, host: str, hosts: dict[tuple[str, str | None], Row]) -> Row | None:
    """A machine of an accelerator's row and its host's in the same zone; None: the zone lacks the host.

    Args:
        accelerator: A row of accelerators.
        host: The host's instance type.
        hosts: The rows of that instance type by region and zone.
    """
    if host == TPU_HOST:
        return Row(host, accelerator.accelerator, accelerator.number, None, None, accelerator.on_demand,
                   accelerator.spot, accelerator.region, accelerator.zone)  # fmt: skip
    beside = hosts.get((accelerator.region, accelerator.zone))
    if beside is None:
        return None
    return Row(
        instance_type=host,
        accelerator=accelerator.accelerator,
        number=accelerator.number,
        cpus=beside.cpus,
        memory_gib=beside.memory_gib,
        on_demand=_sum(accelerator.on_demand, beside.on_demand),
        spot=_sum(accelerator.spot, beside.spot),
        region=accelerator.region,
        zone=accelerator.zone,
    )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
