"""Limits of a run in money and time, held across all of its attempts. Standard library only.

What a run has spent is an estimate from its records, not the bill: for each attempt its node time, from the start of
setup.sh to its end, and an allowance for what no record sees, times its nodes and the price of one.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from trainer.attempt.ending import DEADLINE, MAX_SPEND, Ending
from trainer.attempt.limit_variables import ALLOWANCE_VARIABLE, DEADLINE_VARIABLE, SPEND_VARIABLE
from trainer.attempt.price import PRICES, price_of, read_ladder
from trainer.errors import TrainerError
from trainer.layout.events import YEAR_5000, Event, event_named, number, read_events, read_metrics, read_progress
from trainer.layout.lifetime import UNSEEN_S, lead_s
from trainer.layout.names import AttemptName, RunPaths, list_attempts, list_metrics, run_name

ALLOWANCE_S = 300.0
"""The time that each attempt is reckoned to take beside its records: a machine that boots, and is taken down."""
RECOVERY_S = 600.0
"""The time that a change to on-demand machines is reckoned to take: a machine, its set-up, the restore."""


class LimitsError(TrainerError):
    """A limit cannot be read, or not be held because no price is known."""


@dataclass(frozen=True)
class Limits:
    """The limits of a run."""

    max_spend_usd: float | None = None
    deadline: float | None = None
    """Unix seconds."""
    allowance_s: float = ALLOWANCE_S

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Limits | None:
        """The limits that the task sets; None: none.

        Raises:
            LimitsError: a value is none; the message names the variable.
        """
        spend, deadline = env.get(SPEND_VARIABLE, "").strip(), env.get(DEADLINE_VARIABLE, "").strip()
        if not spend and not deadline:
            return None
        allowance = env.get(ALLOWANCE_VARIABLE, "").strip()
        return cls(
            _number(SPEND_VARIABLE, spend, "an amount in USD, like 25") if spend else None,
            _moment(deadline) if deadline else None,
            _number(ALLOWANCE_VARIABLE, allowance, "a number of seconds", least=0.0) if allowance else ALLOWANCE_S,
        )


def _number(variable: str, text: str, what: str, least: float = 1e-9) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < 1e9:
        raise LimitsError(f"{variable}: {text[:80]!r} is not {what}. Correct it in the task's envs, or remove it")
    return value


def _moment(text: str) -> float:
    try:
        found = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        raise LimitsError(
            f"{DEADLINE_VARIABLE}: {text[:80]!r} is not a time like 2026-12-01T08:00:00Z. Correct it in the task's "
            "envs, or remove it"
        ) from None


@dataclass(frozen=True)
class Reached:
    """A limit that is reached, or will be within the time that is kept for the last save."""

    ending: Ending
    message: str
    facts: Mapping[str, Any]
    """What was reckoned with, for the record."""


@dataclass(frozen=True)
class Reckoning:
    """What a run has spent until now, by the records of its attempts."""

    limits: Limits
    earlier_usd: float
    """Of all other attempts, with their allowances."""
    usd_per_hour: float | None
    """The price of a node of this attempt; None: not known, so there is no limit in money."""
    nodes: int
    began: float
    """The start of this attempt's set-up, in seconds on the monotonic clock of this machine."""
    use_spot: bool | None = None
    stopped_at_usd: float = 0.0
    """The highest spend limit at which an attempt has stopped; the same one stays reached."""

    @property
    def node_s(self) -> float:
        """The time of each node of this attempt until now."""
        return max(0.0, time.monotonic() - self.began)

    def spent_usd(self, ahead_s: float = 0.0) -> float:
        """What the run will have spent in `ahead_s` seconds."""
        own_s = self.node_s + ahead_s + self.limits.allowance_s
        return self.earlier_usd + own_s * self.nodes * (self.usd_per_hour or 0.0) / 3600

    def reached(self, ahead_s: float = 0.0) -> Reached | None:
        """The limit that will be reached within `ahead_s` seconds; None: none."""
        limits, spent = self.limits, self.spent_usd()
        facts = {
            "max_spend_usd": limits.max_spend_usd, "spent_usd": round(spent, 6), "usd_per_hour": self.usd_per_hour,
            "nodes": self.nodes, "node_s": round(self.node_s, 3), "allowance_s": limits.allowance_s,
            "deadline": limits.deadline, "ahead_s": round(ahead_s, 3),
        }  # fmt: skip
        most = limits.max_spend_usd
        if most is not None and (self.spent_usd(ahead_s) >= most or self.stopped_at_usd >= most):
            price = f"USD {self.usd_per_hour:g} an hour and node, {self.nodes} node{'s' if self.nodes > 1 else ''}"
            message = (
                f"the spend limit allows no more than a last save: about USD {spent:.2f} of {most:g} is spent, "
                f"allowances included (now {price}; an estimate). Raise it to go on: skyspot launch -n RUN "
                "--max-spend USD"
            )
            return Reached(MAX_SPEND, message.replace("RUN", this_run()), {"cause": MAX_SPEND.cause, **facts})
        if limits.deadline is not None and time.time() + ahead_s >= limits.deadline:
            message = (
                f"the deadline is reached: {shown_time(limits.deadline)}. Set a later one to go on: skyspot launch "
                "-n RUN --deadline TIME"
            )
            return Reached(DEADLINE, message.replace("RUN", this_run()), {"cause": DEADLINE.cause, **facts})
        return None

    def too_late_for_spot(self, steps_left: int, step_s: float) -> dict[str, Any] | None:
        """The facts, if one more preemption would miss the deadline; None: there is time for one.

        Once the steps that are left, a change of machines and the allowance take all the time left, one more preemption
        is too many (Wu et al., Can't Be Late: Optimizing Spot Instance Savings under Deadlines, NSDI 2024). The fact
        `on_demand_in_time` says whether a change to on-demand machines, which nobody takes, still meets the deadline.
        """
        if self.limits.deadline is None or self.use_spot is False or steps_left <= 0:
            return None
        left_s = self.limits.deadline - time.time()
        on_demand_s = steps_left * step_s + RECOVERY_S
        needed_s = on_demand_s + self.limits.allowance_s
        if needed_s < left_s:
            return None
        return {
            "on_demand_in_time": on_demand_s <= left_s,
            "deadline": self.limits.deadline, "left_s": round(left_s, 1), "needed_s": round(needed_s, 1),
            "steps_left": steps_left, "step_s": round(step_s, 4), "recovery_s": RECOVERY_S,
            "allowance_s": self.limits.allowance_s,
        }  # fmt: skip


def await_limit(
    reached: Callable[[float], Reached | None], look_s: float, ahead_s: Callable[[], float], over: threading.Event
) -> tuple[Reached, float] | None:
    """Wait until a limit is reached; returns it with the seconds ahead, or None once `over` is set.

    It is called in a thread of its own, which touches no bucket: one that refuses or hangs switches no limit off.

    Args:
        reached: As `Reckoning.reached`.
        look_s: Seconds between two looks.
        ahead_s: Returns the seconds that a stop may take, from the look after which it is agreed on.
        over: Set once nobody waits any more.
    """
    while not over.wait(look_s):
        seconds = look_s + ahead_s()
        if found := reached(seconds):
            return found, seconds
    return None


def reckon(paths: RunPaths, name: AttemptName, limits: Limits) -> Reckoning:
    """Read what a run has spent; takes a few requests to the bucket for each attempt.

    Args:
        paths: The run's paths.
        name: The attempt that reckons, which has its start event.
        limits: The run's.

    Raises:
        LimitsError: there is a limit in money, and no price is known.
        OSError: the bucket cannot be read.
    """
    lives = [_Life.read(paths, other) for other in list_attempts(paths)]
    own = next((life for life in lives if life.name == name), None) or _Life.read(paths, name)
    ladder = read_ladder(os.environ.get(PRICES, ""))
    price = own.usd_per_hour or price_of(own.place, ladder).get("usd_per_hour")
    earlier = 0.0
    if limits.max_spend_usd is not None:
        if price is None:
            raise LimitsError(
                f"{SPEND_VARIABLE} is set, but {PRICES} has no price, so what the run spends is unknown. Launch with "
                "`skyspot launch`, which sends prices along, or remove the limit from the task's envs"
            )
        for life in lives:
            if life.name != name:
                usd = life.usd_per_hour or price_of(life.place, ladder).get("usd_per_hour") or price
                nodes = life.nodes or own.nodes or 1
                earlier += (life.seconds(lives) + limits.allowance_s) * nodes * usd / 3600
    now, monotonic = time.monotonic(), own.start.get("monotonic")
    since_start = max(0.0, now - monotonic) if isinstance(monotonic, (int, float)) else 0.0
    return Reckoning(
        limits, earlier, price, own.nodes or 1, now - since_start - own.lead_s(lives), own.place.get("use_spot"),
        max((life.stopped_at_usd for life in lives), default=0.0),
    )  # fmt: skip


@dataclass(frozen=True)
class _Life:
    """What is recorded of an attempt."""

    name: AttemptName
    start: Mapping[str, Any]
    last: Mapping[str, Any]
    """The record that was written last: of its end event, if it has one."""
    has_end: bool
    stopped_at_usd: float = 0.0
    """The spend limit at which it stopped; 0: it did not."""

    @classmethod
    def read(cls, paths: RunPaths, name: AttemptName) -> _Life:
        """Read an attempt's records; where start or end are missing, all of those that tell when it lived."""
        events = read_events(paths, name, ("start", "limit", "end"))
        end, limit = event_named(events, "end"), event_named(events, "limit") or {}
        stopped_at = number(limit, "max_spend_usd") or 0.0 if limit.get("cause") == MAX_SPEND.cause else 0.0
        start = event_named(events, "start")
        if start and end:
            return cls(name, start, end, True, stopped_at)
        events = read_events(paths, name)
        records = [event.fields for event in events] + [read_progress(paths, name), *_last_lines(paths, name)]
        key = "monotonic" if number(_first(events), "monotonic") is not None else "time"
        last = max(records, key=lambda fields: number(fields, key, high=YEAR_5000) or 0.0)
        return cls(name, start or _first(events), last, bool(end), stopped_at)

    @property
    def place(self) -> Mapping[str, Any]:
        found = self.start.get("place")
        return found if isinstance(found, Mapping) else {}

    @property
    def usd_per_hour(self) -> float | None:
        return number(self.place, "usd_per_hour")

    @property
    def nodes(self) -> int:
        """0: not recorded."""
        return round(number(self.place, "nodes") or 0)

    def seconds(self, others: Sequence[_Life]) -> float:
        """From the start of its set-up to its end."""
        lived = 0.0
        for key in ("monotonic", "time"):
            first, last = (number(fields, key, high=YEAR_5000) for fields in (self.start, self.last))
            if first is not None and last is not None:
                lived = max(0.0, last - first)
                break
        return self.lead_s(others) + lived + (0.0 if self.has_end else UNSEEN_S)

    def lead_s(self, others: Sequence[_Life]) -> float:
        """From the start of its set-up to its start event."""
        return lead_s(self.start, [life.start for life in others if life.name < self.name])


def _first(events: Sequence[Event]) -> Mapping[str, Any]:
    return events[0].fields if events else {}


def _last_lines(paths: RunPaths, name: AttemptName) -> list[Mapping[str, Any]]:
    """The last line of an attempt's newest metrics file; empty without one."""
    files, lines = list_metrics(paths, name), list[Mapping[str, Any]]()
    with suppress(FileNotFoundError):
        lines += read_metrics(files[-1][1].read_bytes()) if files else []
    return lines[-1:]


def shown_time(moment: float) -> str:
    """A time for a message: `2026-12-01 08:00 UTC`."""
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def this_run() -> str:
    """The name of this run, as SkyPilot's id of the task has it; RUN if there is none."""
    return run_name(os.environ.get("SKYPILOT_TASK_ID", "")) or "RUN"
