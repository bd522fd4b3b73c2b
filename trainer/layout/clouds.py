"""The time left after a cloud's notice, and after SIGTERM: facts that the trainer and skyspot both need."""

from __future__ import annotations

NOTICE_S = {"aws": 120.0, "gcp": 30.0, "azure": 30.0, "kubernetes": 30.0, "runpod": 5.0}
"""Seconds from a cloud's notice to the end of the machine. On Kubernetes the notice is SIGTERM, 30 s by default."""
DEFAULT_GRACE_S = 25.0
"""Seconds from SIGTERM to SIGKILL, unless an option sets another number."""
