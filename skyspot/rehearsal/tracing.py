"""Tracing serves the buckets of a rehearsal's machines through FUSE, and collects what they did there as evidence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.rehearsal import evidence, faults, journal, logs, mounting, sight, times
from skyspot.rehearsal.bucketfs.manners import MANNERS
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.bucketfs.trace import CALLS, EVENTS, POLLS
from skyspot.rehearsal.bucketfs.watcher import Watcher, events_missing
from skyspot.rehearsal.evidence import Changes, Evidence, Place
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.lives import Life
from skyspot.rehearsal.machine import Machine, bucketfs_missing
from skyspot.rehearsal.refusals import Refusal, refusals
from skyspot.rehearsal.replay import Attempt
from skyspot.rehearsal.result import Row, Settings
from skyspot.rehearsal.task import RehearsalTask
from skyspot.rehearsal.verdict import Verdict
from skyspot.rehearsal.watch import walk

_SPREAD = 5
"""With so many saves in the undisturbed run, strikes fall on two saves that follow each other."""


class Tracing:
    """How the machines of a rehearsal see their buckets."""

    def __init__(self, task: RehearsalTask, settings: Settings) -> None:
        """Choose each bucket's kind of mount.

        Raises:
            UsageError: a place in a save is named, and no call is seen here.
        """
        self._seed, self._pinned = settings.seed, settings.at is not None
        self.missing = bucketfs_missing()
        """Why buckets are not served through FUSE here; None: they are."""
        self.sight = CALLS if self.missing is None else EVENTS if events_missing() is None else POLLS
        """How the traces are made."""
        writable = [mount for mount in task.lasting if not mount.read_only]
        kinds = {mount.path: settings.mount_like or mount.kind or mounting.UNKNOWN for mount in writable}
        self.manners = kinds if self.missing is None else {}
        """The kind of mount of each bucket that is served, by mount point."""
        self.point = task.bucket.path if task.bucket and task.bucket.path in kinds else None
        """Mount point of the bucket with the run; None: it is not traced."""
        bucket = task.bucket.kind if task.bucket else None
        self._named = settings.mount_like is not None or bucket not in (None, "local")
        """True if the user or the task tells the kind of mount of the run's bucket."""
        self._too_late = False
        """A kill in a save came when that had finished."""
        self._missed: dict[str, str] = {}
        """Why calls of a leg were missed."""
        if settings.at is not None and self.point not in self.manners:
            raise UsageError(f"--at: calls on the bucket cannot be seen: {self.missing or 'the task mounts none'}")
        results = [pattern.glob for pattern in settings.compare.patterns if pattern.mount in (None, self.point)]
        whole = self.sight == CALLS
        self.evidence = Evidence(results, settings.checkpoints, calls_seen=whole) if self.point else None
        self.refused: dict[str, list[list[Refusal]]] = {}
        """What the mounts refused, by leg, for each of its attempts."""

    def note(self, task: RehearsalTask, settings: Settings) -> str | None:
        """Say what is not seen of the bucket, or which kind of mount was assumed where the task does not tell."""
        if self.point and self.missing:
            return sight.note(self.sight, self.point, self.missing)
        if self.point is None or settings.mount_like or (task.bucket and task.bucket.kind):
            return None
        kinds = ", ".join(kind for kind in MANNERS if kind != mounting.UNKNOWN)
        return (
            f"{self.point} behaves like a mounted bucket on S3, the strictest kind, because the task names no store; "
            f"--mount-like chooses another ({kinds})."
        )

    @property
    def manners_with_records(self) -> dict[str, str]:
        """The kinds of mounts of a task with records, after its undisturbed run: none unless one is told.

        Its records tell more than calls do, so that a bucket is served only for its manners.
        """
        return self.manners if self._named else {}

    def note_with_records(self) -> str | None:
        """Say that the manners of a mount were tried in the undisturbed run alone."""
        if self._named or not self.manners or self.manner == "local":
            return None
        return (
            f"{self.point} behaved like a mounted bucket on S3 in the undisturbed run, and like a local disk after it, "
            f"because the task names no store; --mount-like {self.manner} has it behave so throughout."
        )

    @property
    def manner(self) -> str:
        """The kind of mount of the run's bucket."""
        return self.manners.get(self.point, "local") if self.point else "local"

    def at_calls(self, plan: list[Preemption], settings: Settings) -> list[Preemption]:
        """Have preemptions that concern a save fall on its calls; without a save, leave them out.

        Raises:
            UsageError: the save has no place that is named as `--at` has it; or no kind can be tried here.
        """
        if self.evidence is None:
            return plan
        if self.sight != CALLS:
            tried = sight.tried(self.sight, plan, str(self.missing))
            return [one for one in tried if one.kind not in faults.AT_A_CALL or self.evidence.places()]
        places, tears = told_apart(self.evidence.places()), MANNERS[self.manner].direct
        if settings.at is not None:
            ends = [place for path in self._firsts() if (place := self.evidence.after_a_save(path))]
            return [replace(plan[0], at_fraction=None, place=named(settings.at, [*ends, *places]))]
        return faults.at_calls(plan, places, settings.seed, tears=tears, every=settings.every_write)

    def revised(self, planned: Preemption | None) -> Preemption | None:
        """Have a strike in a save fall on the checkpoint that is known by now; it may be another than was guessed."""
        if planned is None or planned.place is None or self.evidence is None or self._pinned:
            return planned
        places = told_apart(self.evidence.places())
        if planned.kind == faults.AT_WRITE or planned.at_place in [place.description for place in places]:
            return planned
        chosen = [replace(planned, place=None)]
        tears = MANNERS[self.manner].direct
        return next(iter(faults.at_calls(chosen, places, self._seed, tears=tears, every=False)), planned)

    def slots(self) -> list[str]:
        """The files that saves take turns to write, if a strike can choose which of them is the newest."""
        return self._firsts() if self.sight == CALLS and not self._pinned else []

    def _firsts(self) -> list[str]:
        learnt = self.evidence.learnt if self.evidence else None
        family = learnt.files.family if learnt else None
        return [slot[0] for slot in family.slots] if family else []

    def why_not(self) -> dict[str, str]:
        """Say why kinds that concern a save were not tried."""
        if self.evidence is None:
            return {}
        if not self.evidence.places():
            return dict.fromkeys(faults.AT_A_CALL, "the task saves nothing before its end")
        if self.sight != CALLS:
            unseen = dict.fromkeys(sight.NOT_TRIED[self.sight], f"it needs FUSE: {self.missing}")
            return unseen | ({"kill-in-save": "the save had finished before the kill"} if self._too_late else {})
        if not MANNERS[self.manner].direct:
            return {"torn": f"on a mount like {self.manner} a file appears whole, when it is closed or uploaded"}
        return {}

    def strike(self, planned: Preemption | None, leg: str, attempt: int) -> tuple[str, Strike] | None:
        """The bucket and call at which a leg's next attempt is struck; None: at no call."""
        if planned is None or planned.place is None or self.point is None:
            return None
        place = planned.place
        if attempt == 1:
            return self.point, place.at_first
        if place.second and self._struck_save(planned) == 2 and self._has_room(leg, 2):
            return self.point, place.second
        return self.point, place.later

    def _struck_save(self, planned: Preemption) -> int:
        """The how-manieth save of an attempt that resumes is struck: 1, or 2.

        An attempt that is struck in its first save leaves the checkpoint that it resumed from. One that is struck in
        its second leaves the next one, so that a script which saves less at every other time is found.
        """
        return self._reach if planned.kind != faults.AT_WRITE and not self._pinned else 1

    @property
    def _reach(self) -> int:
        """The how-manieth save of an attempt that resumes is struck at the most."""
        learnt = self.evidence.learnt if self.evidence else None
        return 2 if learnt and len(learnt.saves) >= _SPREAD else 1

    def saved(self, machine: Machine, attempt: int) -> Changes | None:
        """Tells when an attempt may be preempted: the first one, once it has saved; None: at any time."""
        evidence = self.evidence
        wanted = evidence.changes_until_saved() if evidence and attempt == 1 else 0
        if not wanted or evidence is None or evidence.paths is None or self.point is None:
            return None
        return Changes(machine.traces[self.point], evidence.paths, wanted, calls_seen=self.sight == CALLS)

    def view(self, machine: Machine) -> Path | None:
        """The run's bucket as a machine sees it, where files arrive later; None: as it is."""
        served = machine.served.get(self.point) if self.point else None
        return served.disk / "view" if served and not MANNERS[served.manners].direct else None

    def watch(self, machine: Machine, bucket: Path) -> None:
        """Watch the run's bucket for a machine that has not started, if it is not served through FUSE."""
        if self.point is not None and self.sight != CALLS:
            trace = machine.folder.parent / f"{machine.folder.name}.trace"
            machine.watchers.append(Watcher(self.sight, bucket, trace))
            machine.traces[self.point] = trace

    def in_save(self, machine: Machine) -> Callable[[float, Callable[[], bool]], bool] | None:
        """Waits until a checkpoint is being written; None: each call is seen, or nothing is known of checkpoints."""
        paths = self.evidence.paths if self.evidence else None
        if not machine.watchers or paths is None:
            return None
        return functools.partial(machine.watchers[0].calls.wait_for_a_write, paths)

    def confirm(self, leg: str, row: Row) -> None:
        """Correct what a row says of its kill in a save."""
        learnt = self.evidence.learnt if self.evidence else None
        lives = self.evidence.lives(leg) if self.evidence else ()
        row.hit = learnt is not None and bool(lives) and sight.is_incomplete(learnt, lives[-1])
        row.ended = "killed while saving" if row.hit else "killed, when the save had finished"
        self._too_late = self._too_late or not row.hit

    def judge(self, leg: str, same: bool) -> Verdict | None:
        """Judge whether a leg's attempts resumed; None if they did."""
        found = self.evidence
        if found is None or found.learnt is None:
            why = self.missing or "the task writes to no bucket"
            return Verdict(False, False, f"not checked: whether it resumed cannot be seen here, because {why}")
        why_not, missed = self._why_no_reads(), self._missed.get("reference") or self._missed.get(leg, "")
        return sight.judge(self.sight, found.learnt, found.lives(leg), same, missing=why_not, missed=missed)

    def lives(self, leg: str) -> tuple[Life, ...]:
        """What each attempt of a leg did; empty if that is not known."""
        known = self.evidence and "reference" not in self._missed and leg not in self._missed
        return self.evidence.lives(leg) if self.evidence and known else ()

    def _why_no_reads(self) -> str:
        return f"{self.missing}, and {events_missing()}" if self.sight == POLLS else ""

    def record(
        self, leg: str, machine: Machine, row: Row, listing: dict[str, int], remains: dict[str, int], ended_s: float
    ) -> None:
        """Add an attempt to the evidence, once its machine is gone.

        Args:
            leg: The name of its leg.
            machine: Its machine.
            row: How it ended.
            listing: What lay in the bucket when it began.
            remains: What lies there now.
            ended_s: When it ended, on the monotonic clock.
        """
        calls = {point: machine.calls(point) for point in machine.traces}
        refused = [
            one
            for point, found in calls.items()
            for one in refusals(found, self.manners.get(point, ""), "" if point == self.point else f"{point}/")
        ]
        self.refused.setdefault(leg, []).append(refused)
        if self.evidence is None or self.point is None or self.point not in machine.traces:
            return
        finished, left = row.kind == "finished", machine.left_at is not None
        whole, reads = calls[self.point], self.sight != POLLS
        there = None if finished else remains
        attempt = Attempt(
            whole, finished, listing, machine.started, ended_s, machine.noticed_s, left, reads, there,
            MANNERS[self.manner].upload_after_s is not None,
        )  # fmt: skip
        if missed := sight.gap(whole):
            self._missed[leg] = missed
        self.evidence.add(leg, attempt)

    def is_sound(self, leg: str) -> bool:
        """True if a leg's latest attempt left complete saves and nothing of another, and more than one is to come."""
        lives = self.evidence.lives(leg) if self.evidence else ()
        room = bool(lives) and self._has_room(leg, self._reach)
        return room and lives[-1].end.newest is not None and not lives[-1].end.incomplete

    def runs_to_its_end(self, leg: str, planned: Preemption, careful: bool) -> bool:
        """True if a leg's next attempt must not be struck, or nothing would show what one strike did.

        The next strike would fall in the run's last save, and nothing would go on from that. Or, for a careful leg, the
        last one left files of an incomplete save where a restart finds them: the result tells what comes of it.
        """
        lives = self.evidence.lives(leg) if self.evidence else ()
        if not lives or self.sight == POLLS:  # Looks do not tell what was complete just before the strike.
            return False
        room = planned.place is None or self._has_room(leg, self._struck_save(planned))
        return (careful and lives[-1].end.partly) or not room

    def _has_room(self, leg: str, struck: int = 1) -> bool:
        """True if another save follows the one that is struck, counted from the newest of a leg."""
        assert self.evidence
        learnt, newest = self.evidence.learnt, self.evidence.lives(leg)[-1].end.newest
        if learnt is None:
            return False
        if learnt.journal:
            return (newest.files[0].size if newest else 0) < journal.ROOM * learnt.journal_size
        return (newest.index if newest else 0) + struck < len(learnt.saves)

    def refused_at_last(self, leg: str) -> list[Refusal]:
        """What the mounts refused to a leg's latest attempt, in that order."""
        return self.refused[leg][-1] if self.refused.get(leg) else []

    def refused_in(self, *legs: str) -> list[Refusal]:
        """What the mounts refused to all attempts of some legs."""
        return [one for leg in legs for attempt in self.refused.get(leg, []) for one in attempt]

    def go_on(self, leg: str, other: str) -> None:
        """Have a leg begin with what another's first attempt left."""
        if self.evidence:
            self.evidence.go_on(leg, other)

    def fill(self, row: Row, leg: str, output: Path) -> None:
        """Write into the row of a leg's latest attempt what was seen: what it resumed from, what it left.

        Args:
            row: The attempt's.
            leg: The leg's name.
            output: What the attempt printed; tells the step, where the checkpoint's name does not.
        """
        lives = self.lives(leg)
        if self.evidence and lives:
            row.resumed, row.lost_work = evidence.resumed_from(lives[-1]), evidence.lost_work(lives[-1])
            used = lives[-1].resume.used
            if row.resumed and used and not used.numbers and (place := logs.first_place(output)):
                row.resumed += f", then {place}"
            times.fill_from_trace(row, self.evidence.latest(leg), lives[-1])
            if times.is_passed_by(self.evidence.latest(leg), lives[-1]):
                row.hit, row.ended = False, f"{row.ended}, when a newer save was complete"


def told_apart(places: Sequence[Place]) -> list[Place]:
    """Number the places of one description from the second on: `before the write to a at 0 (2)`."""
    count: dict[str, int] = {}
    found = []
    for place in places:
        number = count[place.description] = count.get(place.description, 0) + 1
        found.append(replace(place, description=f"{place.description} ({number})") if number > 1 else place)
    return found


def named(at: str, places: Sequence[Place]) -> Place:
    """Find the place that `--at` names.

    Raises:
        UsageError: there is none; names the nearest.
    """
    by_name = {place.description: place for place in places}
    if at not in by_name:
        near = did_you_mean(at, by_name) or (f" Its first place: {shown(next(iter(by_name)))}" if by_name else "")
        raise UsageError(f"--at: a save of this task has no place {shown(at, 200)}.{near}")
    return by_name[at]


def listing(bucket: Path) -> dict[str, int]:
    """List the files in a bucket: relative path to size in bytes."""
    return {Path(path).relative_to(bucket).as_posix(): size for path, size in walk(bucket)}
