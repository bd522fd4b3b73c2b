"""The engine runs a task locally without and with preemptions, and has the results compared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skyspot.errors import SkyspotError, UsageError
from skyspot.rehearsal import (
    advice,
    by_kind,
    evidence,
    faults,
    files,
    levels,
    logs,
    records,
    remedies,
    scratch,
    turns,
    unheeded,
    verdict,
)
from skyspot.rehearsal.bucketfs.trace import CALLS
from skyspot.rehearsal.compare.control import Outcome, control, judge
from skyspot.rehearsal.compare.difference import Sides
from skyspot.rehearsal.compare.files import compare_files
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.interrupts import undisturbed
from skyspot.rehearsal.left_records import left_records
from skyspot.rehearsal.legs import Legs, Start
from skyspot.rehearsal.machine import namespace_command, no_namespace
from skyspot.rehearsal.metadata import services
from skyspot.rehearsal.needs import with_needs
from skyspot.rehearsal.pace import Pace, pace, too_short
from skyspot.rehearsal.processes import kill_below
from skyspot.rehearsal.remedies import Cause, Finding
from skyspot.rehearsal.result import CONTROL, OTHER_PROCESSES, PREEMPTED, Kind, Leg, Result, Settings, refuse_calls
from skyspot.rehearsal.resumes import LOST_WORK
from skyspot.rehearsal.task import RehearsalTask
from skyspot.rehearsal.view import View

PATIENCE, PATIENCE_S = 4.0, 30.0
"""So many times the undisturbed run's time, or so many seconds, may pass before the last legs begin, which tell kinds
apart. The first of these always runs, so that a slow machine does not decide the verdict where one is enough. A script
of 10 s then takes less than 6 times as long."""
_MISSES = {
    "kill-in-save": "the kill came after the save had finished",
    "torn": "there was no checkpoint to tear",
}


def rehearse(task: RehearsalTask, settings: Settings, view: View) -> Result:
    """Run the reference, the preempted leg, and the leg that changes its number of processes; judge them.

    Raises:
        SkyspotError: the folder to keep is in use.
    """
    started = time.monotonic()
    task = with_needs(task, settings)
    notes = list(task.notes)
    if namespace_command() is None:
        notes.append(
            f"{no_namespace()}: the task's paths were rewritten in its environment and in `run`, "
            "and SKYSPOT_MOUNT is unset"
        )
    clouds = {faults.CLOUD, *map(faults.cloud_of, settings.kinds)}
    with _folder(settings.keep) as folder, services(clouds) as servers:
        legs = Legs(task, settings, view, folder, servers)
        result = Result(legs.all, notes, 0.0, str(settings.keep) if settings.keep else None)
        if settings.keep:
            notes.append(f"{settings.keep} holds each leg's bucket and its machines' logs.")
        engine = _Engine(task, settings, legs)
        engine.rehearse(notes)
        notes += unheeded.told(legs.all, {cloud for cloud, server in servers.items() if server.requests})
        result.kinds, result.files = engine.kinds(), engine.files()
        result.records, result.unrecorded = left_records(legs, gone=None if settings.keep else folder)
        result.seconds = time.monotonic() - started
        if not settings.keep:
            for leg in legs.all:
                if leg.log:
                    scratch.keep(Path(leg.log).parent)
        return result


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Provide the folder for machines and buckets, and delete it afterwards unless it is to be kept."""
    scratch.remove_stale()
    place = _to_keep(keep) if keep is not None else _temporary()
    try:
        yield place
    finally:
        with undisturbed():
            kill_below(str(place))
            for disk in list(place.glob("*/machine-*/home")):
                scratch.delete_tree(disk.parent)  # It was interrupted while it was set up.
            scratch.remove_all()


def _to_keep(keep: Path) -> Path:
    try:
        if keep.exists() and any(keep.iterdir()):
            raise UsageError(f"--keep {keep}: the folder is not empty")
        keep.mkdir(parents=True, exist_ok=True)
        (keep / ".probe").touch()
        (keep / ".probe").unlink()
    except OSError as error:
        raise SkyspotError(f"--keep {keep}: {error.strerror}") from None
    return keep.resolve()


def _temporary() -> Path:
    try:
        return scratch.make("rehearsal")
    except OSError as error:
        raise SkyspotError(f"cannot create a temporary folder: {error}. Set TMPDIR to a writable folder") from None


class _Engine:
    """Runs the legs of one rehearsal, and judges them."""

    def __init__(self, task: RehearsalTask, settings: Settings, legs: Legs) -> None:
        self.task, self.settings, self.legs = task, settings, legs
        self.rules = dataclasses.replace(settings.compare, python=str(task.interpreter.path))
        self.reference = Outcome({}, None)
        self.started = time.monotonic()
        legs.has_all_files = self._has_all_files

    def rehearse(self, notes: list[str]) -> None:
        first = self.settings.processes[0]
        reference = self.legs.run("reference", "Undisturbed", [], [first])
        if not reference.finished:
            why = "does not end" if reference.rows[-1].timed_out else "the task failed without a preemption"
            more = " Train fewer steps, or give it more time: --timeout 2h" if reference.rows[-1].timed_out else ""
            failed = verdict.Verdict(False, False, f"not checked: {why}.{more}\n{reference.failure}")
            reference.verdict = advice.after_failure(failed, self.legs.tracing.refused_at_last("reference"), None, None)
            return
        self.reference = self._outcome("reference")
        history = self.reference.history
        self.legs.records = history is not None
        if history:
            refuse_calls(self.settings)
        plan = faults.schedule(
            list(self.settings.kinds),
            self.settings.preemptions,
            self.settings.seed,
            steps=history.steps if history else None,
            first_save=self._first_save(),
        )
        if history:
            self._with_records(history, plan, notes)
            return
        self._without_records(self.legs.tracing.at_calls(plan, self.settings))
        if note := self.legs.tracing.note(self.task, self.settings):
            notes.append(note)
        if self.files():
            notes.append(f"{files.told(self.files())}.")

    def files(self) -> list[files.Kind]:
        """The kinds of files that a task without records writes to its bucket; empty if that is not known."""
        found = self.legs.tracing.evidence
        return found.kinds() if found and not self.legs.records else []

    def _with_records(self, history: verdict.History, plan: list[Preemption], notes: list[str]) -> None:
        first, steps = self.settings.processes[0], history.steps
        main = self.legs.run(PREEMPTED, "Preempted", plan, [first], steps)
        self._judge(main)
        if len(self.settings.processes) > 1:
            rest = len(self.settings.processes) - 1
            moves = [
                Preemption("sigterm", at_step=max(1, steps * number // (rest + 1))) for number in range(1, rest + 1)
            ]
            title = f"{' then '.join(map(str, self.settings.processes))} processes"
            moved = self.legs.run("world-size", title, moves, list(self.settings.processes), steps)
            self._judge(moved, across=True)
        told = levels.promised(history), verdict.fall(history), self.legs.tracing.note_with_records()
        notes += [note for note in told if note]
        weak = verdict.no_proof(history)
        if weak and main.verdict and main.verdict.exact:
            main.verdict = verdict.Verdict(False, False, f"not checked: {weak}")

    def _without_records(self, plan: list[Preemption]) -> None:
        """Preempt a task without records; where it ends early, by success or failure, go on with what is left.

        So one fault does not hide others, and a short run is enough. Legs of one kind, or of one place in a save, then
        tell which are at fault, as long as patience lasts. With `--every-write` each place gets its verdict, however
        long that takes.
        """
        every = self.settings.every_write
        main = self._leg(PREEMPTED, "Preempted", plan, careful=not every)
        pending = self._go_on(main, list(main.pending), careful=not every or not _is_exact(main))
        if pending and main.verdict and main.verdict.exact:
            had = len(plan) - len(pending)
            main.verdict = verdict.Verdict(False, False, f"not checked: {self._too_short(had, len(plan))}")
        if self._can_go_on(main):
            legs = self.legs
            turns.try_each(legs.tracing, legs.all, main, lambda name, title, one: self._leg(name, title, [one]))
            suspects = by_kind.suspects(self.legs.all)
            places = [one for one in plan if one.place and by_kind.sort(one.kind, one.at_place) in suspects]
            if every and len(places) > 1:
                self._go_on(main, places, apart=True)
            # The last strike of a leg that went wrong is the likeliest culprit: one leg may clear all others.
            self._tell_apart(plan, by_kind.before_the_last(self.legs.all))
            for sort in [*by_kind.suspects(self.legs.all), *by_kind.untried(self.legs.all)]:
                self._tell_apart(plan, [sort])

    def _leg(
        self, name: str, title: str, plan: list[Preemption], start: Start | None = None, *, careful: bool = True,
        apart: bool = False,
    ) -> Leg:  # fmt: skip
        """Run a leg of a task without records, and judge it."""
        leg = self.legs.run(name, title, plan, [self.settings.processes[0]], start=start, careful=careful)
        leg.apart = apart
        self._judge(leg)
        return leg

    def _go_on(
        self, main: Leg, plan: list[Preemption], *, careful: bool = True, apart: bool = False
    ) -> list[Preemption]:
        """Try preemptions in as many further legs as they need. Return those that could not be tried.

        What a strike left is read by an attempt that is not struck, unless `careful` is False and all legs are exact.
        """
        while plan and self._can_go_on(main) and (start := self.legs.start()):
            name = f"preempted-{len(self.legs.all)}"
            leg = self._leg(name, "Preempted again", plan, start, careful=careful, apart=apart)
            plan, careful = list(leg.pending), careful or not _is_exact(leg)
            if not leg.preempted:
                break
        return plan

    def _tell_apart(self, plan: list[Preemption], sorts: list[by_kind.Sort]) -> None:
        """Run a leg with one strike of each of these sorts: the first of its kind, or as long as patience lasts."""
        took_s = time.monotonic() - self.started
        late = any(leg.apart for leg in self.legs.all) and took_s > max(PATIENCE_S, PATIENCE * self.legs.reference_s)
        asked_for = self.settings.every_write and any(place for _, place in sorts)
        by_sort = {by_kind.sort(one.kind, one.at_place): one for one in reversed(plan)}
        strikes = [by_sort[sort] for sort in sorts if sort in by_sort]
        if not strikes or (late and not asked_for) or not (start := self.legs.start()):
            return
        title = f"Only {', '.join(dict.fromkeys(one.kind for one in strikes))}"
        self._leg(f"apart-{len(self.legs.all)}", title, strikes, start, apart=True)

    def _can_go_on(self, leg: Leg) -> bool:
        """True if preemptions that a leg ended without can be tried in another one, which begins with checkpoints."""
        found = self.legs.tracing.evidence
        return not self.legs.records and leg.preempted > 0 and found is not None and found.paths is not None

    def kinds(self) -> list[Kind]:
        """The verdict by kind; empty if nothing was preempted."""
        struck = [leg for leg in self.legs.all if leg.name not in ("reference", "control", "world-size")]
        if not struck:
            return []
        asked = list(self.settings.kinds)
        at_writes = any(row.kind == faults.AT_WRITE for leg in struck for row in leg.rows)
        if (self.settings.every_write or at_writes) and faults.AT_WRITE not in asked:
            asked.append(faults.AT_WRITE)
        no_turn = by_kind.without_a_turn(self.settings.kinds, self.settings.preemptions)
        found = by_kind.table(struck, asked, {**no_turn, **self.legs.tracing.why_not()})
        moved = next((leg for leg in self.legs.all if leg.name == "world-size"), None)
        if moved and moved.verdict:
            found.append(Kind(OTHER_PROCESSES, by_kind.in_a_word(moved.verdict), moved.title))
        elif len(self.settings.processes) > 1:
            why = "it records no steps, as the trainer and run.steps do"
            found.append(Kind(OTHER_PROCESSES, by_kind.NOT_TRIED, why))
        return found

    def _judge(self, leg: Leg, across: bool = False) -> None:
        if not leg.finished:
            leg.verdict = self._unfinished(leg)
            return
        judged = judge(self.reference, self._outcome(leg.name), self.rules, across=across)
        if any(one.checked and not one.exact for one in judged) and not self.settings.assume_reproducible:
            judged = self._controlled(judged, across)
        if self.legs.records:
            there = self.task.bucket.folder if self.task.bucket else None
            folders = records.run_folders(self.legs.bucket(leg.name), there)
            resumed = records.judge(leg.rows, all(one.exact for one in judged), folders)
            judged = [resumed, *judged] if resumed else judged
        if not judged:
            text = (
                "not checked: its bucket has no records of skyspot's trainer. If the task uses SpotRun, give it "
                "$SKYSPOT_CHECKPOINT_DIR; else name the task's results: --compare 'GLOB' (within its bucket)"
            )
            judged.append(verdict.Verdict(False, False, text))
        elif not self.legs.records:
            if early := advice.exited_early(leg.rows):
                judged = [advice.with_exit(one, early) for one in judged]
            judged = self._with_evidence(leg, judged)
        hit = {row.kind for row in leg.rows if row.hit and row.struck}
        judged += self._failed_at_sigterm(leg)
        missed = [row for row in leg.rows if not row.hit and row.kind not in hit]
        if missed and not (hit and self.legs.tracing.sight != CALLS):  # Events come too late for a small save.
            one = missed[0]
            why = one.ended if one.place else _MISSES.get(one.kind, one.ended)
            judged.append(verdict.Verdict(False, False, f"{by_kind.INCONCLUSIVE}: {why}"))
        if (
            leg.pending
            and not any(row.place for row in missed)
            and not self._can_go_on(leg)
            and not any(one.checked and not one.exact for one in judged)
        ):
            short = self._too_short(leg.preempted, leg.planned)
            judged.insert(0, verdict.Verdict(False, False, f"not checked: {short}"))
        chosen = next((one for one in judged if not one.exact), judged[0])
        leg.verdict = advice.with_refusals(chosen, self.legs.tracing.refused_in("reference", leg.name))

    def _failed_at_sigterm(self, leg: Leg) -> list[verdict.Verdict]:
        failed = next((row for row in leg.rows if row.stays_down), None)
        if failed is None:
            return []
        learnt = self.legs.tracing.evidence.learnt if self.legs.tracing.evidence else None
        saved = f" It did not save {learnt.saves[0].largest} then." if learnt and learnt.saves else ""
        text = (
            f"stays down: attempt {failed.number} failed at its preemption ({failed.ended}), and SkyPilot does not "
            f"restart a task that fails. Likely cause: {failed.stays_down}.{saved}"
        )
        return [verdict.Verdict(False, True, text, by_kind.STAYS_DOWN, remedy=remedies.WORKERS.remedy)]

    def _unfinished(self, leg: Leg) -> verdict.Verdict:
        """The verdict on a run that never finished."""
        found, tracing = self.legs.tracing.evidence, self.legs.tracing
        refused = tracing.refused_at_last(leg.name)
        seen = evidence.cause_of_failure(found.learnt, found.lives(leg.name)) if found and found.learnt else None
        struck = [row for row in leg.rows if row.kind not in ("finished", "failed")]
        if struck and leg.rows[-1].kind == "failed" and leg.rows[-1].first_step is None:
            text = (
                f"stays down: NOT exact: the run never finished. Before it failed: {struck[-1].ended}.\n{leg.failure}"
            )
            down = verdict.Verdict(False, True, text, by_kind.STAYS_DOWN)
            return advice.after_failure(down, refused, seen, struck[-1])
        ended = verdict.Verdict(False, True, f"NOT exact: the run never finished.\n{leg.failure}")
        return advice.after_failure(ended, refused, seen, None)

    def _with_evidence(self, leg: Leg, judged: list[verdict.Verdict]) -> list[verdict.Verdict]:
        """Add what was seen of the bucket: whether each attempt resumed, and the cause of a difference."""
        found, same = self.legs.tracing.evidence, all(one.exact for one in judged)
        resumed = self.legs.tracing.judge(leg.name, same)
        if found is None or found.learnt is None:
            return [*judged, resumed] if resumed else judged
        lives = self.legs.tracing.lives(leg.name)
        if same:
            lost = {life.number for life in lives if life.resume.outcome == LOST_WORK}
            for row in leg.rows:
                row.lost_work = row.number in lost
            return [resumed, *judged] if resumed else judged
        if resumed:
            why: Cause | None = Cause(resumed.text, Finding("", resumed.remedy))
        else:
            told = logs.cause(self.legs.bucket("reference"), self.legs.bucket(leg.name))
            why = evidence.cause(found.learnt, lives, told)
        return [one if one.exact or not one.checked or one.remedy else advice.with_cause(one, why) for one in judged]

    def _too_short(self, had: int, wanted: int) -> str:
        history, found = self.reference.history, self.legs.tracing.evidence
        known = Pace("steps", history.steps, self._first_save()) if history else pace(found.learnt if found else None)
        return too_short(had, wanted, known=known, seconds=self.legs.reference_s, written_s=self.legs.written_s)

    def _has_all_files(self, leg: str) -> bool:
        """True if a leg's bucket has what the undisturbed run left: the same results, else files of all its names."""
        if self.rules.names_results:
            left, right = self._outcome_buckets("reference"), self._outcome_buckets(leg)
            return compare_files(self.rules, left, right, Sides()).exact
        ours, theirs = self.legs.bucket(leg), self.legs.bucket("reference")
        names = [path.relative_to(theirs) for path in theirs.glob("**/*") if path.is_file()]
        return all((ours / name).is_file() for name in names)

    def _controlled(self, judged: list[verdict.Verdict], across: bool) -> list[verdict.Verdict]:
        """Run the task undisturbed again, once; if it differs by itself, that verdict comes first."""
        leg = next((one for one in self.legs.all if one.name == "control"), None)
        leg = leg or self.legs.run("control", CONTROL, [], [self.settings.processes[0]])
        if not leg.finished:
            text = f"not checked: the task failed when it was run undisturbed again.\n{leg.failure}"
            return [verdict.Verdict(False, False, text)]
        found = control(self.reference, self._outcome("control"), self.rules, across=across)
        if found:
            return [found]
        note = "a second undisturbed run gave the same result."
        return [one if one.exact else dataclasses.replace(one, notes=(*one.notes, note)) for one in judged]

    def _outcome(self, leg: str) -> Outcome:
        """What a finished leg left."""
        paths = self.legs.paths(leg)
        return Outcome(self._outcome_buckets(leg), verdict.read_history(paths) if paths else None)

    def _outcome_buckets(self, leg: str) -> dict[str | None, Path]:
        """The buckets with results, by the mount points that `--compare` names."""
        mounts = {None, *(pattern.mount for pattern in self.rules.patterns)}
        return {mount: self.legs.bucket(leg, self.task.lasting_at(mount)) for mount in mounts}

    def _first_save(self) -> int | None:
        return records.first_save(self.legs.paths("reference"))


def _is_exact(leg: Leg) -> bool:
    return leg.verdict is not None and leg.verdict.exact
