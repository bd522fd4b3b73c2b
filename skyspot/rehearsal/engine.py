"""The engine runs a task locally without and with preemptions, and has the results compared."""

from __future__ import annotations

import dataclasses
import functools
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skyspot.errors import SkyspotError, UsageError
from skyspot.rehearsal import failure, faults, verdict
from skyspot.rehearsal.compare.control import Outcome, control, judge
from skyspot.rehearsal.compare.difference import Sides
from skyspot.rehearsal.compare.files import compare_files
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.injector import LOOK_S, Injector
from skyspot.rehearsal.limits import format_duration, limit_s
from skyspot.rehearsal.machine import Machine, namespace_command
from skyspot.rehearsal.metadata import AwsMetadata
from skyspot.rehearsal.needs import with_needs
from skyspot.rehearsal.result import CONTROL, Leg, Result, Row, Settings, heading
from skyspot.rehearsal.task import MachineMount, RehearsalTask
from skyspot.rehearsal.upload import copy_folder
from skyspot.rehearsal.view import View
from skyspot.rehearsal.watch import Watch, find_run
from trainer.layout.events import event_named, read_events
from trainer.layout.exit_codes import EXIT_NO_PROGRESS
from trainer.layout.names import RunPaths, list_attempts

MORE_ATTEMPTS = 10
_MISSES = {
    "kill-in-save": "the kill came after the save had finished",
    "torn": "there was no checkpoint to tear",
}
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
            "this system allows no mount namespace: the task's paths were rewritten in its environment and in `run`, "
            "and SKYSPOT_MOUNT is unset"
        )
    with _folder(settings.keep) as folder, AwsMetadata() as server:
        engine = _Engine(task, settings, view, folder, server)
        result = Result(engine.legs, notes, 0.0, str(settings.keep) if settings.keep else None)
        if settings.keep:
            notes.append(f"{settings.keep} holds each leg's bucket and its machines' logs.")
        engine.rehearse(notes)
        result.seconds = time.monotonic() - started
        return result


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Provide the folder for machines and buckets, and delete it afterwards unless it is to be kept."""
    if keep is not None:
        try:
            if keep.exists() and any(keep.iterdir()):
                raise UsageError(f"--keep {keep}: the folder is not empty")
            keep.mkdir(parents=True, exist_ok=True)
            (keep / ".probe").touch()
            (keep / ".probe").unlink()
        except OSError as error:
            raise SkyspotError(f"--keep {keep}: {error.strerror}") from None
        yield keep.resolve()
        return
    try:
        path = Path(tempfile.mkdtemp(prefix="skyspot-rehearsal-"))
    except OSError as error:
        raise SkyspotError(f"cannot create a temporary folder: {error}. Set TMPDIR to a writable folder") from None
    try:
        yield path.resolve()
    finally:
        # A second Ctrl-C must not interrupt the deletion.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in _INTERRUPTS}
        shutil.rmtree(path, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class _Engine:
    """The legs of one rehearsal."""

    def __init__(self, task: RehearsalTask, settings: Settings, view: View, folder: Path, server: AwsMetadata) -> None:
        self.task, self.settings, self.view, self.folder, self.server = task, settings, view, folder, server
        self.legs: list[Leg] = []
        self.rules = dataclasses.replace(settings.compare, python=str(task.interpreter.path))
        self.reference = Outcome({}, None)
        self.reference_s = 0.0
        """Duration of the undisturbed run, from its machine's start."""
        self.written_s = 0.0
        """Duration of the undisturbed run after its first write to the bucket; 0 if it never wrote."""
        self.records = False
        """True if the task keeps attempt records."""

    def rehearse(self, notes: list[str]) -> None:
        first = self.settings.processes[0]
        reference = self._leg("reference", "Undisturbed", [], [first])
        if not reference.finished:
            why = "does not end" if reference.rows[-1].timed_out else "the task failed without a preemption"
            more = " Train fewer steps, or give it more time: --timeout 2h" if reference.rows[-1].timed_out else ""
            reference.verdict = verdict.Verdict(False, False, f"not checked: {why}.{more}\n{reference.failure}")
            return
        self.reference = self._outcome("reference")
        history = self.reference.history
        self.records = history is not None
        steps = history.steps if history else None
        plan = faults.schedule(
            list(self.settings.kinds),
            self.settings.preemptions,
            self.settings.seed,
            steps=steps,
            first_save=self._first_save(),
        )
        main = self._leg("preempted", "Preempted", plan, [first], steps)
        self._judge(main)
        if history and len(self.settings.processes) > 1:
            rest = len(self.settings.processes) - 1
            moves = [
                Preemption("sigterm", at_step=max(1, history.steps * number // (rest + 1)))
                for number in range(1, rest + 1)
            ]
            title = f"{' then '.join(map(str, self.settings.processes))} processes"
            moved = self._leg("world-size", title, moves, list(self.settings.processes), steps)
            self._judge(moved, across=True)
        if not history:
            if len(self.settings.processes) > 1:
                notes.append(
                    "This task does not use skyspot's trainer, so changing the number of processes was not tested."
                )
            return
        fell = verdict.fall(history)
        notes += [fell] if fell else []
        weak = verdict.no_proof(history)
        if weak and main.verdict and main.verdict.exact:
            main.verdict = verdict.Verdict(False, False, f"not checked: {weak}")

    def _judge(self, leg: Leg, across: bool = False) -> None:
        if not leg.finished:
            leg.verdict = verdict.Verdict(False, True, f"NOT exact: the run never finished.\n{leg.failure}")
            return
        judged = judge(self.reference, self._outcome(leg.name), self.rules, across=across)
        if any(one.checked and not one.exact for one in judged) and not self.settings.assume_reproducible:
            judged = self._controlled(judged, across)
        if not judged:
            text = (
                "not checked: this task does not use skyspot's trainer. "
                "Name its results: --compare 'GLOB' (within its bucket)"
            )
            judged.append(verdict.Verdict(False, False, text))
        hit = {row.kind for row in leg.rows if row.hit}
        missed = [row for row in leg.rows if not row.hit and row.kind not in hit]
        if missed:
            text = f"inconclusive: {_MISSES.get(missed[0].kind, missed[0].ended)}"
            judged.append(verdict.Verdict(False, False, text))
        wanted = self.settings.preemptions if not across else len(self.settings.processes) - 1
        if leg.finished and leg.preempted < wanted:
            judged.append(verdict.Verdict(False, False, f"not checked: {self._too_short(leg, wanted)}"))
        leg.verdict = next((one for one in judged if not one.exact), judged[0])

    def _too_short(self, leg: Leg, wanted: int) -> str:
        history = self.reference.history
        return faults.too_short(
            leg.preempted,
            wanted,
            steps=history.steps if history else None,
            save_every=self._first_save(),
            seconds=self.reference_s,
            written_s=self.written_s,
        )

    def _has_all_files(self, leg: str) -> bool:
        """True if a leg's bucket has what the undisturbed run left: the same results, else files of all its names."""
        if self.rules.names_results:
            left, right = self._outcome_buckets("reference"), self._outcome_buckets(leg)
            return compare_files(self.rules, left, right, Sides()).exact
        ours, theirs = self._bucket(leg), self._bucket("reference")
        names = [path.relative_to(theirs) for path in theirs.glob("**/*") if path.is_file()]
        return all((ours / name).is_file() for name in names)

    def _controlled(self, judged: list[verdict.Verdict], across: bool) -> list[verdict.Verdict]:
        """Run the task undisturbed again, once; if it differs by itself, that verdict comes first."""
        leg = next((one for one in self.legs if one.name == "control"), None)
        leg = leg or self._leg("control", CONTROL, [], [self.settings.processes[0]])
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
        paths = self._paths(leg)
        return Outcome(self._outcome_buckets(leg), verdict.read_history(paths) if paths else None)

    def _outcome_buckets(self, leg: str) -> dict[str | None, Path]:
        """The buckets with results, by the mount points that `--compare` names."""
        mounts = {None, *(pattern.mount for pattern in self.rules.patterns)}
        return {mount: self._bucket(leg, self.task.lasting_at(mount)) for mount in mounts}

    def _bucket(self, leg: str, mount: MachineMount | None = None) -> Path:
        """The folder that stands in for a mount in a leg; by default for the run's bucket."""
        other = mount is not None and mount != self.task.bucket
        return self.folder / leg / (f"bucket-{self.task.mounts.index(mount)}" if mount and other else "bucket")

    def _paths(self, leg: str) -> RunPaths | None:
        return find_run(self._bucket(leg), self.task.run_folder)

    def _first_save(self) -> int | None:
        paths = self._paths("reference")
        for name in list_attempts(paths) if paths else []:
            for event in read_events(paths, name) if paths else []:
                if event.name == "saved" and isinstance(event.fields.get("step"), int):
                    return int(event.fields["step"])
        return None

    # -- one leg -----------------------------------------------------------------------------------------------------

    def _leg(
        self, name: str, title: str, plan: list[Preemption], processes: list[int], steps: int | None = None
    ) -> Leg:
        """Run the task to its end: preempt it as planned, and restart it as SkyPilot would."""
        leg, pending = Leg(name, title), list(plan)
        self.legs.append(leg)
        self.view.leg(heading(title, len(plan)), steps)
        buckets = self._buckets(name)
        launch = f"sky-managed-rehearsal-{name}-{secrets.token_hex(3)}_{self.task.name}_1-0"
        started = time.monotonic()
        for number in range(1, len(plan) + MORE_ATTEMPTS + 1):
            count = processes[min(number - 1, len(processes) - 1)]
            planned = pending[0] if pending else None
            self.view.attempt(number, count, planned.kind if planned else "to the end")
            machine = Machine(
                self.task, self.folder / name / f"machine-{number:02d}", buckets, self._env(launch, count)
            )
            watch = Watch(self._bucket(name), self.task.run_folder)
            injector = Injector(
                planned, machine, watch, self.server, self.view, self.reference_s, self.written_s, self.records,
                functools.partial(self._has_all_files, name),
            )  # fmt: skip
            try:
                row, code = self._attempt(injector, number, count, leg.rows[-1] if leg.rows else None)
                if name == "reference":
                    over = machine.left_at or time.monotonic()
                    self.reference_s = over - machine.started
                    self.written_s = max(0.0, over - (watch.alive_since or over))
            finally:
                machine.take()
            self._fill(row, watch)
            _lost_steps(leg.rows[-1] if leg.rows else None, row.restored_step)
            leg.rows.append(row)
            self.view.ended(row)
            if row.kind == "finished":
                leg.finished = True
                break
            if row.kind == "failed":
                ended = row.ended if code is None else f"exit {code}"
                leg.failure = failure.describe(ended, machine.log, machine.folder)
                if code not in self.task.recover_on or code == EXIT_NO_PROGRESS:
                    break
            elif row.hit or len([one for one in leg.rows if not one.hit]) > 3:
                pending.pop(0)
        else:
            last = leg.failure or leg.rows[-1].ended
            leg.failure = f"{len(leg.rows)} attempts did not finish it. The last one: {last}"
        if not leg.finished:
            self._keep_log(leg, machine.log)
        leg.seconds = time.monotonic() - started
        self._goodput(leg)
        self.view.leg_done(leg)
        return leg

    def _keep_log(self, leg: Leg, log: Path) -> None:
        """Name the output of the attempt at which the leg ended."""
        if kept := failure.keep_log(log, f"{leg.name}-{log.name}", kept=self.settings.keep is not None):
            leg.log = str(kept)
            leg.failure += f"\n  its whole output: {kept}"

    def _buckets(self, leg: str) -> dict[str, Path]:
        """Create the folders that outlive the leg's machines, by mount point."""
        found = {}
        for mount in self.task.lasting:
            own = self._bucket(leg, mount)
            own.mkdir(parents=True, exist_ok=True)
            if mount.folder is not None:
                # The task's writes must not change the original folder.
                copy_folder(mount.folder, own, leave_out=self.folder, uploaded=mount.uploaded)
            found[mount.path] = own
        self._bucket(leg).mkdir(parents=True, exist_ok=True)
        return found

    def _env(self, launch: str, processes: int) -> dict[str, str]:
        return {
            **self.settings.env,
            **self.server.env(),
            "SKYPILOT_TASK_ID": launch,
            "SKYPILOT_NODE_IPS": "127.0.0.1",
            "SKYPILOT_NODE_RANK": "0",
            "SKYPILOT_NUM_NODES": "1",
            "SKYPILOT_NUM_GPUS_PER_NODE": str(self.task.gpus_per_node),
            "SKYPILOT_CLUSTER_INFO": '{"cluster_name": "rehearsal", "cloud": "aws", "region": "here"}',
            "SKYSPOT_PROCESSES": str(processes),
            "SKYSPOT_NOTICE_POLL_S": "0.2",
        }

    def _attempt(self, injector: Injector, number: int, processes: int, before: Row | None) -> tuple[Row, int | None]:
        """Run one attempt on one machine until it ends or is preempted."""
        machine, watch = injector.machine, injector.watch
        if self.settings.setup and self.task.setup.strip():
            machine.start(self.task.setup)
            assert machine.process
            code = machine.process.wait()
            if code:
                return Row(number, "failed", f"setup failed with exit {code}", processes), code
        machine.start(self.task.run)
        while True:
            status, step = machine.poll(), watch.look()
            watch.alive_s()
            if step is not None and before and before.last_step is not None and before.lost_steps is None:
                _lost_steps(before, self._restored_step(watch))
            self.view.step(step)
            if status == 0:
                return Row(number, "finished", "finished", processes), 0
            if status is not None:
                return Row(number, "failed", f"exited on its own with {status}", processes), status
            if machine.left_at is None and injector.due(step):  # A task that has ended cannot be preempted.
                return injector.take(number, processes)
            first_write_s = (watch.alive_since or machine.started) - machine.started
            limit = limit_s(self.settings.timeout_s, reference_s=self.reference_s, first_write_s=first_write_s)
            if time.monotonic() - machine.started > limit:
                return Row(number, "failed", self._stopped(limit), processes, timed_out=True), None
            time.sleep(LOOK_S)

    def _stopped(self, limit: float) -> str:
        took = f"; the undisturbed run took {format_duration(self.reference_s)}" if self.reference_s else ""
        return f"stopped after {format_duration(limit)}, it had not ended{took}"

    # -- attempt records ---------------------------------------------------------------------------------------------

    def _fill(self, row: Row, watch: Watch) -> None:
        """Copy the attempt's records into its row."""
        paths, attempt = watch.paths, watch.attempt()
        if not paths or not attempt:
            return
        watch.look()
        events = read_events(paths, attempt)
        first, end = event_named(events, "first-step") or {}, event_named(events, "end") or {}
        row.restored_step = self._restored_step(watch)
        row.first_step, row.last_step = _int(first.get("step")), watch.step
        row.first_step_s = _float(first.get("seconds"))
        row.committed_s = _float(end.get("committed_s"))

    def _restored_step(self, watch: Watch) -> int | None:
        paths, attempt = watch.paths, watch.attempt()
        events = read_events(paths, attempt) if paths and attempt else []
        return _int((event_named(events, "restored") or {}).get("step"))

    def _goodput(self, leg: Leg) -> None:
        paths = self._paths(leg.name)
        history = verdict.read_history(paths) if paths and leg.finished else None
        if history and leg.seconds:
            kept = sum(float(line.get("step_s") or 0.0) for line in history.lines.values())
            leg.goodput = kept / leg.seconds


def _lost_steps(row: Row | None, restored_step: int | None) -> None:
    """Set an attempt's lost steps, which are known once the next attempt has resumed."""
    if row and row.last_step is not None and restored_step is not None:
        row.lost_steps = max(0, row.last_step - restored_step)


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
