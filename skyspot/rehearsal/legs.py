"""The legs of a rehearsal: a run from its first attempt to its end, on machines that are taken as planned."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from skyspot.rehearsal import failure, faults, records, times, verdict
from skyspot.rehearsal.bucketfs.trace import CALLS
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.injector import LOOK_S, Injector
from skyspot.rehearsal.limits import format_duration, limit_s
from skyspot.rehearsal.machine import Machine
from skyspot.rehearsal.metadata import Metadata
from skyspot.rehearsal.result import Leg, Row, Settings, heading
from skyspot.rehearsal.task import MachineMount, RehearsalTask
from skyspot.rehearsal.tracing import Tracing, listing
from skyspot.rehearsal.upload import copy_folder
from skyspot.rehearsal.view import View
from skyspot.rehearsal.watch import Watch, find_run
from trainer.layout.exit_codes import EXIT_NO_PROGRESS, EXIT_STOPPED
from trainer.layout.names import RunPaths

MORE_ATTEMPTS = 10


@dataclass(frozen=True)
class Start:
    """What a leg begins with that goes on from another's first attempt."""

    leg: str
    """The name of that leg."""
    buckets: dict[str, Path]
    """Copies of its buckets after that attempt, by mount point."""


class Legs:
    """Runs the legs of one rehearsal."""

    def __init__(
        self, task: RehearsalTask, settings: Settings, view: View, folder: Path, servers: Mapping[str, Metadata]
    ) -> None:
        """Prepare; `servers` are the metadata services, by cloud."""
        self.task, self.settings, self.view, self.folder, self.servers = task, settings, view, folder, servers
        self.all: list[Leg] = []
        self.tracing = Tracing(task, settings)
        self.reference_s = 0.0
        """Duration of the undisturbed run, from its machine's start."""
        self.written_s = 0.0
        """Duration of the undisturbed run after its first write to the bucket; 0 if it never wrote."""
        self.records = False
        """True if the task keeps attempt records."""
        self.has_all_files: Callable[[str], bool] = lambda _: False
        """True if a leg's bucket has what the undisturbed run left."""
        self._start: Start | None = None

    def bucket(self, leg: str, mount: MachineMount | None = None) -> Path:
        """The folder that stands in for a mount in a leg; by default for the run's bucket."""
        other = mount is not None and mount != self.task.bucket
        return self.folder / leg / (f"bucket-{self.task.mounts.index(mount)}" if mount and other else "bucket")

    def paths(self, leg: str) -> RunPaths | None:
        """The run's folder in a leg's bucket; None if there is none."""
        return find_run(self.bucket(leg), self.task.run_folder)

    def start(self) -> Start | None:
        """What a leg begins with that goes on after the first strike: complete checkpoints, and nothing half done.

        It is what the first strike left, or else what one more attempt leaves that is taken between two saves. None if
        there are no saves, or that attempt was not taken.
        """
        places = self.tracing.evidence.places(early=True) if self.tracing.evidence and self.tracing.point else []
        if self._start is None and places:
            leg, count = Leg("start", "Start"), self.settings.processes[0]
            # Before the save, or after it has arrived where a file does so later than at its close.
            at = places[-1] if any(place.later.does == "upload" for place in places) else places[0]
            planned = Preemption(faults.AT_WRITE, place=at)
            if self.tracing.sight != CALLS:
                planned = Preemption("kill", at_fraction=0.0)
            buckets = self._buckets(leg.name, None)
            self.view.attempt(1, count, "until it has saved")
            row, _, _ = self._on_a_machine(leg, 1, planned, buckets, self._launch(leg.name), count)
            if row.kind == planned.kind:
                self._start = Start(leg.name, buckets)
        return self._start

    def run(
        self,
        name: str,
        title: str,
        plan: list[Preemption],
        processes: list[int],
        steps: int | None = None,
        start: Start | None = None,
        *,
        careful: bool = True,
    ) -> Leg:
        """Run the task to its end: preempt it as planned, and restart it as SkyPilot would.

        Args:
            name: The leg's name; a folder of it holds its buckets.
            title: Its name for people.
            plan: The preemptions, in order.
            processes: The number of processes of each attempt; the last one counts for all that follow.
            steps: The number of steps of the run, if known.
            start: What it begins with; None: with nothing.
            careful: False: an attempt is struck even if the last strike left an incomplete save for it to find.
        """
        leg = Leg(name, title, planned=len(plan))
        self.all.append(leg)
        self.view.leg(heading(title, len(plan)), steps)
        buckets, first = self._buckets(name, start), 2 if start else 1
        if start:
            self.tracing.go_on(name, start.leg)
        launch = self._launch(name)
        started, pending = time.monotonic(), list(plan)
        for number in range(first, first + len(plan) + MORE_ATTEMPTS):
            count = processes[min(number - 1, len(processes) - 1)]
            planned = self.tracing.revised(self._next(leg, pending, careful))
            self.view.attempt(number, count, planned.kind if planned else "to the end")
            row, code, machine = self._on_a_machine(leg, number, planned, buckets, launch, count)
            row.place = planned.at_place if planned else None
            leg.rows.append(row)
            self.view.ended(row)
            if row.kind == "finished":
                leg.finished = True
                break
            if row.kind == "failed":
                ended = row.ended if code in (None, EXIT_STOPPED) else f"exit {code}"
                leg.failure = failure.describe(ended, machine.log, machine.folder)
                if code not in self.task.recover_on or code == EXIT_NO_PROGRESS:
                    break
            elif row.hit or machine.watchers or len([one for one in leg.rows if not one.hit]) > 3:
                pending.pop(0)
                if number == 1:
                    self._keep_start(leg, buckets)
        else:
            last = leg.failure or leg.rows[-1].ended
            leg.failure = f"{len(leg.rows)} attempts did not finish it. The last one: {last}"
        if not leg.finished:
            self._keep_log(leg, machine.log)
        leg.pending, leg.seconds = tuple(pending), time.monotonic() - started
        paths = self.paths(name)
        leg.goodput = records.goodput(verdict.read_history(paths) if paths and leg.finished else None, leg.seconds)
        self.view.leg_done(leg)
        return leg

    def _next(self, leg: Leg, pending: list[Preemption], careful: bool) -> Preemption | None:
        """The preemption of a leg's next attempt; None: it is to run to its end."""
        if not pending:
            return None
        # Of a task with records, these tell what each attempt resumed from.
        ends = not self.records and leg.preempted and self.tracing.runs_to_its_end(leg.name, pending[0], careful)
        return None if ends else pending[0]

    def _on_a_machine(
        self,
        leg: Leg,
        number: int,
        planned: Preemption | None,
        buckets: dict[str, Path],
        launch: str,
        processes: int,
    ) -> tuple[Row, int | None, Machine]:
        """Run one attempt on a new machine. Return its row, its exit code if it exited, and the machine, taken."""
        before, own = leg.rows[-1] if leg.rows else None, self.bucket(leg.name)
        there = listing(own)
        env = self._env(launch, processes, planned)
        manners = self.tracing.manners_with_records if self.records else self.tracing.manners
        machine = Machine(self.task, self.folder / leg.name / f"machine-{number:02d}", buckets, env, manners)
        if not self.records:
            self.tracing.watch(machine, own)
        watch = Watch(own, self.task.run_folder, self.tracing.view(machine) if self.records else None)
        injector = Injector(
            planned, machine, watch, self.servers.get(_cloud(planned)), self.view, self.reference_s, self.written_s,
            self.records, lambda: self.has_all_files(leg.name),
            None if self.records else self.tracing.saved(machine, number), self.tracing.in_save(machine),
        )  # fmt: skip
        try:
            row, code = self._attempt(injector, leg.name, number, processes, before)
        finally:
            over = machine.left_at or time.monotonic()
            machine.take()
        if leg.name == "reference":
            self.reference_s = over - machine.started
            self.written_s = max(0.0, over - (watch.alive_since or over))
        self.tracing.record(leg.name, machine, row, there, listing(own), over)
        if row.kind == "kill-in-save" and machine.watchers:
            self.tracing.confirm(leg.name, row)
        self.tracing.fill(row, leg.name, machine.log)
        times.fill(row, code, machine, over)
        records.fill(row, watch)
        if self.records:
            records.judge_start(row, watch, before)
        records.set_lost_steps(before, row.restored_step)
        return row, code, machine

    def _attempt(
        self, injector: Injector, leg: str, number: int, processes: int, before: Row | None
    ) -> tuple[Row, int | None]:
        """Run one attempt on one machine until it ends or is preempted."""
        machine, watch = injector.machine, injector.watch
        if self.settings.setup and self.task.setup.strip():
            machine.start(self.task.setup)
            assert machine.process
            code = machine.process.wait()
            if code:
                return Row(number, "failed", f"setup failed with exit {code}", processes), code
        machine.start(self.task.run, self.tracing.strike(injector.planned, leg, number))
        while True:
            status, step = machine.poll(), watch.look()
            watch.alive_s()
            if step is not None and before and before.last_step is not None and before.lost_steps is None:
                records.set_lost_steps(before, records.restored_step(watch))
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

    def _keep_log(self, leg: Leg, log: Path) -> None:
        """Name the output of the attempt at which the leg ended."""
        if kept := failure.keep_log(log, f"{leg.name}-{log.name}", kept=self.settings.keep is not None):
            leg.log = str(kept)
            leg.failure += f"\n  its whole output: {kept}"

    def _buckets(self, leg: str, start: Start | None) -> dict[str, Path]:
        """Create the folders that outlive the leg's machines, by mount point."""
        found = {}
        for mount in self.task.lasting:
            own = self.bucket(leg, mount)
            own.mkdir(parents=True, exist_ok=True)
            if start:
                shutil.copytree(start.buckets[mount.path], own, symlinks=True, dirs_exist_ok=True)
            elif mount.folder is not None:
                # The task's writes must not change the original folder.
                copy_folder(mount.folder, own, leave_out=self.folder, uploaded=mount.uploaded)
            found[mount.path] = own
        self.bucket(leg).mkdir(parents=True, exist_ok=True)
        return found

    def _keep_start(self, leg: Leg, buckets: dict[str, Path]) -> None:
        """Copy the buckets after the first strike, for legs that go on from there, if a leg can begin with them."""
        warned = leg.rows[0].kind in faults.WARNED  # What is saved at a warning may be at fault.
        if self._start or self.records or warned or not self.tracing.is_sound(leg.name):
            return
        copies = {path: self.folder / "start" / str(order) for order, path in enumerate(buckets)}
        for path, folder in buckets.items():
            shutil.copytree(folder, copies[path], symlinks=True)
        self._start = Start(leg.name, copies)

    def _launch(self, leg: str) -> str:
        """The name of one launch, the same in all of its attempts."""
        return f"sky-managed-rehearsal-{leg}-{secrets.token_hex(3)}_{self.task.name}_1-0"

    def _env(self, launch: str, processes: int, planned: Preemption | None) -> dict[str, str]:
        cloud = _cloud(planned)
        return {
            **self.settings.env,
            **(self.servers[cloud].env if cloud in self.servers else {}),
            "SKYPILOT_TASK_ID": launch,
            "SKYPILOT_NODE_IPS": "127.0.0.1",
            "SKYPILOT_NODE_RANK": "0",
            "SKYPILOT_NUM_NODES": "1",
            "SKYPILOT_NUM_GPUS_PER_NODE": str(self.task.gpus_per_node),
            "SKYPILOT_CLUSTER_INFO": json.dumps({"cluster_name": "rehearsal", "cloud": cloud, "region": "here"}),
            "SKYSPOT_PROCESSES": str(processes),
            "SKYSPOT_NOTICE_POLL_S": "0.2",
            "SKYSPOT_TRACE_STEPS": "1",
        }


def _cloud(planned: Preemption | None) -> str:
    """The cloud of an attempt's machine, as SkyPilot names it."""
    return faults.cloud_of(planned.kind) if planned else faults.CLOUD
