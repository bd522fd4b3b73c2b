"""Has a run reach its limit in money or time, however fast the machine is."""

import time
from dataclasses import replace

from trainer import SpotRun


def reach_limit(run: SpotRun) -> None:
    """Wait until the run has seen its limit, as if the attempts before had spent more, or time had flown."""
    journal = run.journal
    limits = journal._reckoning.limits
    if limits.deadline:
        limits = replace(limits, deadline=time.time())
    journal._reckoning = replace(journal._reckoning, limits=limits, earlier_usd=limits.max_spend_usd or 0.0)
    while not journal.stop_reason:
        time.sleep(0.01)
