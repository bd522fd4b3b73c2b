"""How long an attempt kept its machine, by its records: for the limits that the trainer holds, and for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.layout.events import YEAR_5000, number

UNSEEN_S = 60.0
"""The time that is added after the last record of an attempt without an end event."""
SETUP_TO_RUN_S = 300.0
"""A set-up that ended longer before the launcher's start was another job's."""


def lead_s(start: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]]) -> float:
    """Seconds from the start of the set-up to the start event; from the launcher's start, if no set-up is recorded.

    The machine keeps the seconds of its last set-up. They count for the first attempt after it, if that begins soon.

    Args:
        start: The fields of the attempt's start event.
        earlier: Those of earlier attempts.
    """
    setup, since = number(start, "setup_s"), number(start, "since_setup_s")
    launched = number(start, "launched_s") or 0.0
    if setup is None:
        return launched
    ended_at = -math.inf
    if since is None:  # Of a release that did not record it.
        since = launched
    else:
        ended_at = (number(start, "time", high=YEAR_5000) or 0.0) - since
    machine = start.get("machine")
    another = machine and any(
        one.get("machine") == machine and (number(one, "time", high=YEAR_5000) or 0.0) > ended_at for one in earlier
    )
    return launched if another or since - launched > SETUP_TO_RUN_S else setup + since
