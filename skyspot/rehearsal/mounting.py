"""The kind of mount that SkyPilot would use for each of a task's buckets."""

from __future__ import annotations

from skyspot.task.document import Task
from skyspot.task.mounts import Mount

_STORES = {
    "s3": "s3",
    "r2": "s3",
    "cos": "s3",
    "oci": "s3",
    "nebius": "s3",
    "gcs": "gcs",
    "gs": "gcs",
    "azure": "azure",
}
_CLOUDS = {"aws": "s3", "gcp": "gcs", "azure": "azure"}
UNKNOWN = "s3"
"""Where nothing tells: the strictest kind."""


def kind_of(mount: Mount, task: Task) -> str | None:
    """Name the kind of mount, a key of MANNERS; None if the task does not tell."""
    if mount.mode == "MOUNT_CACHED":
        return "cached"
    if mount.store:
        return _STORES.get(mount.store.lower(), UNKNOWN)
    scheme, found, _ = mount.source.partition("://")
    if found:
        return "azure" if "blob.core.windows.net" in mount.source else _STORES.get(scheme.lower(), UNKNOWN)
    clouds = {rung.cloud for rung in task.rungs}
    return _CLOUDS.get(clouds.pop() or "") if len(clouds) == 1 else None
