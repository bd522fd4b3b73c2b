"""The settings and the result of a rehearsal, with its legs and attempts, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyspot.errors import UsageError, did_you_mean
from skyspot.rehearsal import faults, files
from skyspot.rehearsal.compare.rules import Comparison
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.interpreter import Interpreter
from skyspot.rehearsal.verdict import Verdict

if TYPE_CHECKING:
    from skyspot.runs.records import RunRecords

PREEMPTED = "preempted"
"""The name of the first leg with preemptions."""
CONTROL = "Undisturbed again"
"""The title of the leg that shows whether two undisturbed runs are equal."""
OTHER_PROCESSES = "other processes"
"""The row of the table for the run that changes its number of processes."""


@dataclass(frozen=True)
class Settings:
    """The options of a rehearsal."""

    preemptions: int = 5
    kinds: tuple[str, ...] = faults.DEFAULT_KINDS
    seed: int = 0
    processes: tuple[int, ...] = (1, 2)
    setup: bool = False
    gpus_per_node: int | None = None
    """SKYPILOT_NUM_GPUS_PER_NODE; None: as many accelerators as the task requests."""
    interpreter: Interpreter | None = None
    """The Python of the machines; None: the one that skyspot runs with."""
    compare: Comparison = field(default_factory=Comparison)
    assume_reproducible: bool = False
    """True: where results differ, no second undisturbed run tells whether they do so by themselves."""
    checkpoints: tuple[str, ...] = ()
    """Globs of the checkpoints' files, if the user names them."""
    mount_like: str | None = None
    """The kind of mount of every bucket, a key of MANNERS; None: what the task would get."""
    every_write: bool = False
    """True: a preemption at every call of a save."""
    at: str | None = None
    """The place in a save at which the one preemption falls; None: chosen."""
    keep: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    """How long an attempt may run; None: as limits.py has it."""


@dataclass(frozen=True)
class Kind:
    """One row of the table."""

    kind: str
    outcome: str
    """exact, NOT exact, LOST WORK, stays down, not checked or not tried."""
    why: str
    """What was struck and what came of it, or why it was not tried."""
    place: str | None = None
    """The place in a save that was struck, as `--at` names it; None: it was struck at a time."""


@dataclass
class Row:
    """One attempt."""

    number: int
    kind: str
    """One of faults.KINDS, `finished` or `failed`."""
    ended: str
    """A description for the table."""
    processes: int = 1
    restored_step: int | None = None
    """The step it resumed from; 0: from the start."""
    first_step: int | None = None
    last_step: int | None = None
    left_step: int | None = None
    """The step of the newest complete checkpoint when it had ended; 0: there was none. None: it keeps no records."""
    lost_steps: int | None = None
    """Steps that the next attempt repeated."""
    committed_s: float | None = None
    """Seconds from the notice or signal to the committed checkpoint."""
    first_step_s: float | None = None
    """Seconds from the attempt's start to its first step."""
    hit: bool = True
    """True if the preemption happened as planned."""
    timed_out: bool = False
    """True if it was stopped because it did not end."""
    resumed: str | None = None
    """What it resumed from, where that was seen: `step 10`, `nothing`, or `nothing: LOST WORK`."""
    lost_work: bool = False
    """True if it was seen not to resume, though it could have."""
    unproven: str = ""
    """Why its start does not show whether the task survives the strike before it; empty if it does."""
    place: str | None = None
    """The place in a save at which it was to be struck, as `--at` names it."""
    exited_early: bool = False
    """True if it exited with 0 at a notice or SIGTERM, before all was done."""
    exit_code: int | None = None
    """The exit status that it left with; None: it was killed."""
    after_s: float | None = None
    """Seconds from its start to the strike (the call, the notice or the signal); to its end, if it was not struck."""
    there: str | None = None
    """The checkpoints in the bucket when it had ended: `save 3, part of save 4`. None: not seen, like what follows."""
    last_write_s: float | None = None
    """Seconds from the notice or signal to its last write to the bucket; None: it wrote nothing more."""
    unsaved_s: float | None = None
    """Seconds since its last checkpoint, or its start, which were lost with the machine."""
    again_files: int | None = None
    """Files of checkpoints that it wrote again, as an earlier attempt had made these checkpoints."""
    again_s: float | None = None
    """Seconds that the undisturbed run took for what led to these checkpoints."""
    heard: str = ""
    """The kind of its notice or signal; empty: it got none."""
    saved_since: int | None = None
    """Checkpoints that were completed after its notice or signal; None: not seen, or it was taken in the first one."""
    stays_down: str = ""
    """Why it failed at a notice or SIGTERM; SkyPilot does not restart what fails by itself."""

    @property
    def struck(self) -> bool:
        """True if it was preempted."""
        return self.kind not in ("finished", "failed")


@dataclass
class Leg:
    """One run from its first attempt to its end."""

    name: str
    title: str
    planned: int = 0
    """The number of preemptions."""
    pending: tuple[Preemption, ...] = ()
    """Those that it ended without."""
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    failure: str = ""
    """The reason why it did not finish, with the error from the task's output."""
    log: str | None = None
    """The file with the whole output of the attempt that failed."""
    goodput: float | None = None
    verdict: Verdict | None = None
    apart: bool = False
    """True if it was run to tell which kinds of preemption are at fault."""

    @property
    def preempted(self) -> int:
        """The number of machines that were taken."""
        return len([row for row in self.rows if row.hit and row.struck])


def heading(title: str, preemptions: int) -> str:
    """Format the line above a leg."""
    many = f"{preemptions} preemption{'s' if preemptions != 1 else ''}"
    return f"{title}: {many}" if preemptions else f"{title}: the {'control' if title == CONTROL else 'reference'}"


@dataclass
class Result:
    """The whole rehearsal."""

    legs: list[Leg]
    notes: list[str]
    seconds: float
    folder: str | None = None
    kinds: list[Kind] = field(default_factory=list)
    """The verdict by kind of preemption. Rows are numbered from 1."""
    files: list[files.Kind] = field(default_factory=list)
    """The kinds of files that a task without records writes to its bucket."""
    records: RunRecords | None = None
    """What the attempts of the preempted run recorded; None: `unrecorded` tells why."""
    unrecorded: str = ""

    @property
    def exact(self) -> bool:
        """True if every judged leg is exact."""
        judged = [leg.verdict for leg in self.legs if leg.verdict]
        return bool(judged) and all(verdict.exact for verdict in judged)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON."""
        legs = []
        for leg in self.legs:
            verdict = dataclasses.asdict(leg.verdict) if leg.verdict else None
            found = {**dataclasses.asdict(leg), "preempted": leg.preempted, "verdict": verdict}
            found["pending"] = [one.kind for one in leg.pending]
            legs.append(found)
        kinds = [{"number": number, **dataclasses.asdict(kind)} for number, kind in enumerate(self.kinds, 1)]
        seconds = round(self.seconds, 1)
        written = [{"pattern": one.pattern, "role": one.role, "why": one.why} for one in self.files]
        found = {"exact": self.exact, "seconds": seconds, "notes": self.notes}
        return {**found, "kinds": kinds, "files": written, "legs": legs}


def check_settings(settings: Settings) -> None:
    """Refuse invalid settings.

    Raises:
        UsageError: an unknown kind (names the nearest), or a number out of range.
    """
    for kind in settings.kinds:
        if kind not in faults.KINDS:
            near = did_you_mean(kind, faults.KINDS)
            raise UsageError(f"--kinds: unknown kind {kind!r}; choose from {', '.join(faults.KINDS)}.{near}")
    if not settings.kinds:
        raise UsageError(f"--kinds: name at least one of {', '.join(faults.KINDS)}")
    if settings.at is not None and (len(settings.kinds) != 1 or settings.kinds[0] not in faults.AT_A_CALL):
        raise UsageError(f"--at: choose the kind as well: --kinds with one of {', '.join(faults.AT_A_CALL)}")
    if settings.at is not None and settings.every_write:
        raise UsageError("--at names one place; remove --every-write")
    if not 1 <= settings.preemptions <= 1000:
        raise UsageError(f"--preemptions: must be from 1 to 1000, not {settings.preemptions}")
    if settings.gpus_per_node is not None and not 0 <= settings.gpus_per_node <= 64:
        raise UsageError(f"--gpus-per-node: must be from 0 to 64, not {settings.gpus_per_node}")
    if not settings.processes or any(not 1 <= count <= 64 for count in settings.processes):
        raise UsageError("--processes: give numbers from 1 to 64, like 1,2")


def refuse_calls(settings: Settings) -> None:
    """Refuse what strikes at calls on the bucket, for a task with records.

    Raises:
        UsageError: it was asked for; names the remedy.
    """
    why = "this task records its steps, and is preempted at these"
    if settings.at is not None:
        raise UsageError(f"--at: {why}; remove --at")
    if settings.every_write:
        raise UsageError(f"--every-write: {why}; remove --every-write, and strike its saves with --kinds kill-in-save")
    if faults.AT_WRITE in settings.kinds:
        raise UsageError(f"--kinds {faults.AT_WRITE}: {why}; strike its saves with --kinds kill-in-save")
