"""The grace: the seconds from SIGTERM to SIGKILL. Standard library only."""

from __future__ import annotations

import os

from trainer.layout.clouds import default_grace_s


def grace(requested_s: float | None) -> tuple[float, str]:
    """Return (the seconds from SIGTERM to SIGKILL, a note for the user; empty if nothing was reduced).

    The launcher kills when its own grace is over, whatever the script asks for: the smaller of both counts.

    Args:
        requested_s: The seconds that the script asks for; None: as many as there are, or as the cloud gives.
    """
    try:
        given_s = float(os.environ["SKYSPOT_GRACE_S"])
    except (KeyError, ValueError):
        return (default_grace_s() if requested_s is None else requested_s), ""
    if requested_s is None or requested_s <= given_s:
        return (given_s if requested_s is None else requested_s), ""
    return given_s, (
        f"grace_s={requested_s:g} is reduced to {given_s:g}, because the launcher kills {given_s:g} s after SIGTERM; "
        f"to raise it, start the script with python -m trainer.launch --grace {requested_s:g}"
    )
