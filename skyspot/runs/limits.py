"""What the records of an attempt say of the run's limits, in sentences with the command that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from skyspot.runs.records import text
from skyspot.wording import amount
from trainer.layout.events import YEAR_5000, number

MAX_SPEND, DEADLINE = "max-spend", "deadline"
"""Causes in the end event (trainer/attempt/ending.py)."""


def limit_note(limit: Mapping[str, Any], run: str) -> str:
    """Why a run has stopped, from the event `limit`, and how it goes on; empty if the event says nothing.

    Args:
        limit: The event's fields.
        run: The run's name.
    """
    if text(limit, "cause") == MAX_SPEND:
        spent, most = number(limit, "spent_usd") or 0.0, number(limit, "max_spend_usd") or 0.0
        return (
            f"stopped by its spend limit, at about USD {spent:,.2f} of {amount(most)} (an estimate). To go on: skyspot "
            f"launch -n {run} --max-spend USD"
        )
    if text(limit, "cause") == DEADLINE:
        return f"stopped by its deadline, {_time(limit)}. To go on: skyspot launch -n {run} --deadline TIME"
    return ""


def late_note(late: Mapping[str, Any], run: str) -> str:
    """Whether on-demand machines can still finish in time, from the event `too-late-for-spot`; empty without one."""
    if not late:
        return ""
    needed, left = number(late, "needed_s") or 0.0, number(late, "left_s", -1e9) or 0.0
    if late.get("on_demand_in_time") is False:
        needed -= number(late, "allowance_s") or 0.0
        return (
            f"not even on-demand machines can finish by {_time(late)} (with the change to them: {needed / 3600:.1f} h, "
            f"and {left / 3600:.1f} h were left). Set a later one: skyspot launch -n {run} --deadline TIME"
        )
    return (
        f"only on-demand machines can still finish by {_time(late)} (with one more preemption: {needed / 3600:.1f} h, "
        f"and {left / 3600:.1f} h were left). To change to them: skyspot launch -n {run} --no-use-spot --replace"
    )


def _time(fields: Mapping[str, Any]) -> str:
    try:
        at = datetime.fromtimestamp(number(fields, "deadline", high=YEAR_5000) or 0.0, timezone.utc)
        return at.strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return "a time that cannot be read"
