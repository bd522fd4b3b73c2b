"""The report of a run: what each attempt did, where the time went, what was lost. Plain data, however it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any

from skyspot.money.attempts import NO_WORD, NOTICE, RUNNING, SIGNAL, SILENT, SILENT_S, Life, Place, lives
from skyspot.money.hindsight import Interval, interval_of
from skyspot.money.matching import Match
from skyspot.money.prices import Price
from skyspot.money.spend import Priced, Spend, spend_of
from skyspot.money.times import Times, added, times_of
from skyspot.money.waiting import Wait, waits_by_clocks
from skyspot.runs.limits import DEADLINE, MAX_SPEND, late_note, limit_note
from skyspot.runs.records import AttemptRecords, RunRecords, whole
from trainer.layout.names import run_name

_FINISHED = ("finished", "already-finished")


@dataclass(frozen=True)
class AttemptReport:
    """One attempt in a report. Times in seconds; None: not recorded."""

    name: str
    number: int
    launch: str
    place: Place
    began_at: float | None
    """Unix seconds by its machine's clock, at the start of its set-up."""
    ended_at: float | None
    """At its last record, by the same clock."""
    seconds: float
    ended: str
    """The cause in its end event; RUNNING, SILENT or NO_WORD without one."""
    code: int | None
    notice: str
    is_preemption: bool
    committed_s: float | None
    restored_step: int | None
    last_step: int | None
    steps: int | None
    """Steps that it did."""
    lost_steps: int | None
    """Those of them that were done again, or will be."""
    is_lost_at_least: bool
    """It may have done, and lost, more than is recorded."""
    wait: Wait | None
    """For its machine; None: not known."""
    times: Times
    priced: Priced
    problems: tuple[str, ...]

    @property
    def kept_until(self) -> float:
        """Its last step that is not lost; infinite if it is not known what was lost."""
        return math.inf if self.lost_steps is None or self.last_step is None else self.last_step - self.lost_steps


@dataclass(frozen=True)
class Report:
    """The report of a run."""

    root: str
    state: str
    """`finished`, RUNNING, SILENT, or `ended`."""
    last_step: int | None
    """The newest step that is done and not lost."""
    max_steps: int | None
    attempts: tuple[AttemptReport, ...]
    preemptions: int
    has_steps: bool
    """False: no attempt recorded a step, so nothing is known of goodput and losses."""
    times: Times
    """Of all attempts."""
    goodput: float | None
    """Productive time / total time, from 0 to 1."""
    lost_steps: int
    is_lost_at_least: bool
    spend: Spend
    interval: Interval
    notes: tuple[str, ...]
    """What is missing, and what is not sure, each in a sentence."""


@dataclass(frozen=True)
class Given:
    """What a report needs beside the records."""

    now: float
    """Unix seconds."""
    prices: Mapping[str, Price]
    """By attempt's name: the price of a node, where the records have none."""
    waits: Mapping[str, Wait]
    """By attempt's name: from SkyPilot's record of the job."""
    matches: Mapping[str, Match] = field(default_factory=dict)
    """By attempt's name: its rung in the ladder of the run's task, where the records have none."""
    asked_for: frozenset[str] = frozenset()
    """The attempts that were followed by a recovery that is none from a preemption, as SkyPilot's record says."""
    notes: tuple[str, ...] = ()


def report_of(records: RunRecords, given: Given) -> Report:
    """The report of a run that has begun."""
    found = lives(records.attempts)
    by_clocks, clock_notes = waits_by_clocks(found)
    waits = {**by_clocks, **given.waits}
    has_steps = any(life.restored_step is not None for life in found)
    kept = _kept_until(found, records, given.now)
    reports: list[AttemptReport] = []
    for number_, (one, life) in enumerate(zip(records.attempts, found, strict=True)):
        follower = found[number_ + 1] if number_ + 1 < len(found) else None
        reports.append(_attempt(one, life, follower, kept[number_], waits.get(life.name), given, records.finished))
    times = added([one.times for one in reports])
    preemptions = sum(one.is_preemption for one in reports)
    return Report(
        root=records.root,
        state=_state(reports, records.finished),
        last_step=_last_step(found, kept),
        max_steps=_max_steps(records.attempts),
        attempts=tuple(reports),
        preemptions=preemptions,
        has_steps=has_steps,
        times=times,
        goodput=times.productive / times.total if has_steps and times.total else None,
        lost_steps=sum(one.lost_steps or 0 for one in reports),
        is_lost_at_least=any(one.is_lost_at_least for one in reports),
        spend=spend_of([one.priced for one in reports]),
        interval=interval_of(records.attempts, sum(one.seconds for one in found), preemptions),
        notes=(
            *_notes(reports, has_steps),
            *_limits(records, reports),
            *(note for note in clock_notes if note),
            *given.notes,
        ),
    )


def _kept_until(found: Sequence[Life], records: RunRecords, now: float) -> list[float]:
    """By attempt: the last step that no later attempt did again, or has to do again."""
    kept: list[float] = []
    until = math.inf
    for at in range(len(found) - 1, -1, -1):
        life, own = found[at], until
        is_newest = at == len(found) - 1
        over = life.has_end or not is_newest or _is_silent(life, now)
        done = records.finished and is_newest
        if until == math.inf and over and not done and life.cause not in _FINISHED:
            own = max([one.committed_step for one in found[: at + 1]])  # The next attempt will begin here.
        kept.append(own)
        if life.restored_step is not None:
            until = min(until, life.restored_step)
    return kept[::-1]


def _is_silent(life: Life, now: float) -> bool:
    return not life.has_end and (life.ended_at is None or now - life.ended_at > SILENT_S)


def _attempt(
    records: AttemptRecords, life: Life, follower: Life | None, kept_until: float, wait: Wait | None, given: Given,
    finished: bool,
) -> AttemptReport:  # fmt: skip
    steps = lost = None
    if life.last_step is not None and life.restored_step is not None:
        steps = life.last_step - life.restored_step
        lost = max(0, life.last_step - max(life.restored_step, int(min(kept_until, life.last_step))))
    ended = life.cause or (NO_WORD if follower else SILENT if _is_silent(life, given.now) else RUNNING)
    price = life.recorded_price or given.prices.get(life.name)
    times = times_of(records, life, kept_until, wait.seconds if wait else 0.0)
    return AttemptReport(
        name=life.name, number=life.number, launch=life.launch, place=_place(life, given), began_at=life.began_at,
        ended_at=life.ended_at, seconds=life.seconds, ended=ended, code=life.code, notice=life.notice,
        is_preemption=_is_preemption(life, follower) and life.name not in given.asked_for,
        committed_s=life.committed_s, restored_step=life.restored_step, last_step=life.last_step, steps=steps,
        lost_steps=lost,
        is_lost_at_least=ended != RUNNING and not life.is_last_step_sure and life.restored_step is not None
        and not (finished and follower is None),
        wait=wait, times=times, priced=Priced.of(life, times, price, has_ended=ended != RUNNING),
        problems=records.problems,
    )  # fmt: skip


def _place(life: Life, given: Given) -> Place:
    match = given.matches.get(life.name)
    if match is None or life.place.rung is not None:
        return life.place
    return replace(life.place, rung=match.rung, use_spot=match.use_spot)


def _is_preemption(life: Life, follower: Life | None) -> bool:
    """True if the machine was taken: after a notice, or by a signal or without a word, if the launch then recovered."""
    if life.cause == NOTICE:
        return True
    recovered = follower is not None and life.launch != "" and follower.launch == life.launch
    return recovered and life.cause in ("", SIGNAL)


def _state(reports: Sequence[AttemptReport], finished: bool) -> str:
    newest = reports[-1].ended if reports else ""
    if finished or newest in _FINISHED:
        return "finished"
    return newest if newest in (RUNNING, SILENT) else "ended"


def _last_step(found: Sequence[Life], kept: Sequence[float]) -> int | None:
    known = [
        int(min(life.last_step, until)) for life, until in zip(found, kept, strict=True) if life.last_step is not None
    ]
    return max(known, default=None)


def _max_steps(records: Sequence[AttemptRecords]) -> int | None:
    for one in reversed(records):
        if found := whole(one.progress, "max_steps"):
            return found
        config = one.event("start").get("config")
        if isinstance(config, Mapping) and (found := whole(config, "max_steps")):
            return found
    return None


def _notes(reports: Sequence[AttemptReport], has_steps: bool) -> list[str]:
    """What the records lack, in sentences."""
    notes = [f"{one.name}: {problem}." for one in reports for problem in one.problems]
    notes += [
        f"{one.name}: no end is recorded; its last record counts as its end." for one in reports if one.ended == NO_WORD
    ]
    if not has_steps:
        notes.append("No attempt recorded a step: a script that uses SpotRun does. Goodput and lost steps are unknown.")
    return notes


def _limits(records: RunRecords, reports: Sequence[AttemptReport]) -> list[str]:
    """What limits in money and time did, in sentences: of each attempt that one ended, and of one that runs."""
    folder = PurePath(records.root).name or "RUN"
    notes: list[str] = []
    for one, report in zip(records.attempts, reports, strict=True):
        run = run_name(report.launch) or folder
        note = limit_note(one.event("limit"), run) if report.ended in (MAX_SPEND, DEADLINE) else ""
        if report.ended == RUNNING:
            note = late_note(one.event("too-late-for-spot"), run)
        notes += [f"{one.name}: {note}."] if note else []
    return notes


def to_json(report: Report) -> dict[str, Any]:
    """A report as JSON: seconds, unix seconds, USD; shares from 0 to 1."""
    found = asdict(report)
    found["times"]["total"] = report.times.total
    for one, attempt in zip(found["attempts"], report.attempts, strict=True):
        one["place"]["infra"] = attempt.place.infra
        one["times"]["total"] = attempt.times.total
    return found
