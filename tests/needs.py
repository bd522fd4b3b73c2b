"""Why a test is skipped: `GUARANTEE: REMEDY`, or `GUARANTEE: not on this machine: WHY` where there is no remedy."""

import os

NOT_HERE = "not on this machine"


def needs_root(guarantee: str) -> str:
    """Where the system refused something that root usually may do."""
    return f"{guarantee}: run the tests as root" if os.geteuid() else f"{guarantee}: {NOT_HERE}: refused to root"
