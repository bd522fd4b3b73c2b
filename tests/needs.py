"""Reasons to skip a test: `GUARANTEE: REMEDY`, or `GUARANTEE: not on this machine: WHY` if there is no remedy."""

import os

NOT_HERE = "not on this machine"


def needs_root(guarantee: str) -> str:
    """The reason to skip when the system refused something that root may usually do."""
    return f"{guarantee}: run the tests as root" if os.geteuid() else f"{guarantee}: {NOT_HERE}: refused to root"
