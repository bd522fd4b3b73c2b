"""The time left after a cloud's notice, and after SIGTERM: facts that the trainer and skyspot both need."""

from __future__ import annotations

import json
import math
import os

NOTICE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0, "kubernetes": 30.0, "runpod": 5.0}
"""Seconds from a cloud's notice to the end of the machine. On Kubernetes the notice is SIGTERM, 30 s by default."""
DEFAULT_GRACE_S = 25.0
"""Seconds from SIGTERM to SIGKILL, unless an option sets another number, or the cloud gives less."""
GCP_NOTICE = "SKYSPOT_GCP_NOTICE_S"
"""The variable with the seconds of notice of an instance that was created with `preemptionNoticeDuration`."""


def notice_s(cloud: str) -> float | None:
    """Seconds from a cloud's notice to the end of this machine; None if that is not known."""
    if cloud == "gcp":
        try:
            seconds = float(os.environ[GCP_NOTICE])
        except (KeyError, ValueError):
            return NOTICE_S["gcp"]
        return seconds if math.isfinite(seconds) and seconds >= 0 else NOTICE_S["gcp"]
    return NOTICE_S.get(cloud)


def default_grace_s() -> float:
    """Seconds from SIGTERM to SIGKILL where nobody asks for another number: no more than this machine's cloud gives."""
    return min(DEFAULT_GRACE_S, notice_s(cloud_named()) or DEFAULT_GRACE_S)


def set_gcp_notice(seconds: float | None) -> None:
    """Set the notice of Google Cloud for this process and those that it starts; None changes nothing."""
    if seconds is not None:
        os.environ[GCP_NOTICE] = repr(seconds)


def cloud_named() -> str:
    """The cloud of this machine in small letters, as SkyPilot's variables say, or else SKYSPOT_CLOUD; or empty."""
    try:
        named = json.loads(os.environ.get("SKYPILOT_CLUSTER_INFO", "{}")).get("cloud")
    except (ValueError, AttributeError):
        named = None
    return str(named or os.environ.get("SKYSPOT_CLOUD") or "").lower()
