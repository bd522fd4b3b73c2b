"""One attempt of a run, from its records: where it ran, how it ended, its steps, and where its time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyspot.money.clock import clock_of
from skyspot.money.prices import Price
from skyspot.runs.records import AttemptRecords, text, whole
from trainer.layout.events import YEAR_5000, number
from trainer.layout.lifetime import lead_s

RUNNING, SILENT, NO_WORD = "running", "silent", "no word"
"""Without an end event: the newest attempt, which wrote a moment ago; which did not; and an attempt before another."""
SILENT_S = 300.0
"""A running attempt writes its progress every few seconds; one that has not for so long is said to be silent."""
NOTICE, SIGNAL = "notice", "signal"
"""Causes in the end event (trainer/attempt/ending.py) with which a preemption begins."""


@dataclass(frozen=True)
class Place:
    """Where an attempt ran. Empty and None: not recorded."""

    cloud: str
    region: str
    zone: str
    instance_type: str
    accelerator: str
    """The driver's name of one."""
    accelerators_per_node: int | None
    nodes: int
    """1 if it is not recorded."""
    rung: int | None
    use_spot: bool | None

    @property
    def infra(self) -> str:
        """The place in SkyPilot's spelling: cloud/region/zone; a zone's name mostly begins with its region's."""
        return "/".join(part for part in (self.cloud, self.region, self.zone) if part)


@dataclass(frozen=True)
class Life:
    """One attempt's own account, whatever came after it. Times in seconds."""

    name: str
    number: int
    launch: str
    machine: str
    """The token of its first machine."""
    place: Place
    recorded_price: Price | None
    began_at: float | None
    """Unix seconds by its machine's clock, at the start of its set-up."""
    ended_at: float | None
    """The same clock, at its last record."""
    lead_s: float
    """From the start of its set-up, or of its launcher, to its first record."""
    seconds: float
    """From the start of its set-up to its last record."""
    cause: str
    """Of its end, as its end event says; empty without one."""
    code: int | None
    notice: str
    """The kind of its notice or signal."""
    committed_s: float | None
    """From the notice to the commit."""
    restored_step: int | None
    """None: it did not come so far."""
    restore_s: float
    last_step: int | None
    """The last step that it is known to have done."""
    is_last_step_sure: bool
    """False: it may have done more, as nothing but its metrics tells."""
    committed_step: int
    """The newest step that it saved or restored; 0: none."""

    @property
    def has_end(self) -> bool:
        """True if it wrote its end event."""
        return bool(self.cause)


def lives(records: Sequence[AttemptRecords]) -> list[Life]:
    """Each attempt's own account, in their order."""
    starts = [one.event("start") for one in records]
    return [_life(one, starts[:at]) for at, one in enumerate(records)]


def _life(records: AttemptRecords, starts_before: Sequence[Mapping[str, Any]]) -> Life:
    clock, start, end = clock_of(records), records.event("start"), records.event("end")
    restored, first = records.event("restored"), records.event("first-step")
    times = [clock.at(event.fields) for event in records.events] + [clock.at(records.progress)]
    last = max([at for at in (*times, *map(clock.ended, records.lines)) if at is not None], default=0.0)
    lead = lead_s(_with_launched_s(start, first, clock.at(first)), starts_before)
    steps = [line.step for line in records.lines if line.is_step]
    restored_step = whole(restored, "step")
    if restored_step is None and steps:
        restored_step = steps[0] - 1
    said = whole(end, "step")
    known = [step for step in (*steps[-1:], said, whole(records.progress, "step"), restored_step) if step is not None]
    saved = [step for event in records.events_named("saved") if (step := whole(event, "step")) is not None]
    notice = _object(end, "notice") or records.event("notice")
    return Life(
        name=str(records.name),
        number=records.name.number,
        launch=text(start, "launch", 200),
        machine=text(start, "machine"),
        place=_place(records),
        recorded_price=_price(records),
        began_at=None if clock.first_time is None else clock.first_time - lead,
        ended_at=None if clock.first_time is None else clock.first_time + last,
        lead_s=lead,
        seconds=lead + last,
        cause=text(end, "cause", 40) or ("ended" if end else ""),
        code=whole(end, "code"),
        notice=text(notice, "kind", 40),
        committed_s=_committed_s(records),
        restored_step=restored_step,
        restore_s=number(restored, "seconds") or 0.0,
        last_step=max(known, default=None) if restored_step is not None or known else None,
        is_last_step_sure=said is not None,
        committed_step=max([*saved, whole(end, "committed_step") or 0, whole(restored, "step") or 0]),
    )


def _with_launched_s(
    start: Mapping[str, Any], first: Mapping[str, Any], first_step_at: float | None
) -> Mapping[str, Any]:
    """The start event with the time since the launcher's start, also of a release that did not record it."""
    seconds = number(first, "seconds")
    if number(start, "launched_s") is not None or first_step_at is None or seconds is None:
        return start
    return {**start, "launched_s": max(0.0, seconds - first_step_at)}


def _object(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = fields.get(key)
    return found if isinstance(found, Mapping) else {}


def _place(records: AttemptRecords) -> Place:
    fields = _object(records.event("start"), "place")
    spot = fields.get("use_spot")
    return Place(
        cloud=text(fields, "cloud").lower(),
        region=text(fields, "region"),
        zone=text(fields, "zone"),
        instance_type=text(fields, "instance_type"),
        accelerator=text(fields, "accelerator"),
        accelerators_per_node=whole(fields, "accelerators_per_node"),
        nodes=max(1, min(whole(fields, "nodes") or 1, 100_000)),
        rung=whole(fields, "rung"),
        use_spot=spot if isinstance(spot, bool) else None,
    )


def _price(records: AttemptRecords) -> Price | None:
    fields = _object(records.event("start"), "place")
    usd = number(fields, "usd_per_hour", high=1e6)
    return None if usd is None else Price(usd, number(fields, "on_demand_usd_per_hour", high=1e6), "recorded")


def _committed_s(records: AttemptRecords) -> float | None:
    """Seconds from the notice to the commit of the last step: the end event's, or without one, from the events."""
    if (said := number(records.event("end"), "committed_s")) is not None or records.event("end"):
        return said
    notice, saved = records.event("notice"), records.event("saved")
    heard, at = number(notice, "heard", high=YEAR_5000), number(saved, "time", high=YEAR_5000)
    is_same = whole(notice, "step") is not None and whole(notice, "step") == whole(saved, "step")
    return at - heard if heard is not None and at is not None and is_same and at >= heard else None
