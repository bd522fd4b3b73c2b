"""A managed job under test: submitted, watched through SkyPilot's queue and its run's folder, disturbed, waited for."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import HOME, Lab, call, kill, processes_of, until
from place import CLUSTER, SPOT

from trainer.layout.documents import LayoutError
from trainer.layout.events import read_events
from trainer.layout.manifest import read_manifest
from trainer.layout.names import AttemptName, RunPaths, list_attempts, list_checkpoints

# For what takes one or two minutes on a machine that has nothing else to do. It says that something hangs, not that it
# is slow: how long the whole may take is .ci/run's matter.
PATIENCE_S = 900
ENDED = {
    "SUCCEEDED",
    "CANCELLED",
    "FAILED",
    "FAILED_SETUP",
    "FAILED_PRECHECKS",
    "FAILED_NO_RESOURCE",
    "FAILED_CONTROLLER",
}


def launch(lab: Lab, name: str, *options: Any, task: str = "finetune", infra: str | None = f"slurm/{CLUSTER}/{SPOT}",
           bucket: Path | str | None = "shared") -> Job:  # fmt: skip
    """Submit a task under a name; returns as soon as SkyPilot has accepted it.

    Checkpoints go to the shared folder, unless another bucket (or None) is named; the place is the partition `spot`.
    """
    where = [
        *(["--infra", infra] if infra else []),
        *(["--bucket", lab.shared if bucket == "shared" else bucket] if bucket else []),
    ]
    arguments = [task, "-n", name, *where, "--env", "OMP_NUM_THREADS=1", *options]
    submit(lab, arguments)
    job_id = until(f"{name} in the queue", lambda: newest(lab, name), PATIENCE_S)
    lab.note(f"{name}: submitted as job {job_id}")
    return Job(lab, name, job_id, RunPaths(lab.shared / name))


def submit(lab: Lab, arguments: list[Any]) -> None:
    """The one place that knows how a task is submitted."""
    lab.skyspot("launch", *arguments, "-y", "-d")


def newest(lab: Lab, name: str) -> int | None:
    """The id of the newest managed job of a name."""
    return max((job["job_id"] for job in lab.queue() if job["job_name"] == name), default=None)


@dataclass(frozen=True)
class Job:
    """One managed job."""

    lab: Lab
    name: str
    id: int
    run: RunPaths

    def record(self) -> dict[str, Any]:
        """What SkyPilot's queue says of it: status, recovery_count, failure_reason, infra, ..."""
        return next(job for job in self.lab.queue() if job["job_id"] == self.id)

    @property
    def status(self) -> str:
        """SkyPilot's status, as it is written in the queue."""
        return str(self.record()["status"])

    @property
    def recoveries(self) -> int:
        """How often SkyPilot brought it back."""
        return int(self.record().get("recovery_count") or 0)

    def attempts(self) -> list[AttemptName]:
        """The attempts that have a folder, oldest first."""
        return list_attempts(self.run)

    def events(self, index: int = -1) -> dict[str, dict[str, Any]]:
        """The events of an attempt (the newest by default), by name; of several of a name, the last."""
        attempts = self.attempts()
        return {event.name: dict(event.fields) for event in read_events(self.run, attempts[index])} if attempts else {}

    def committed_step(self) -> int:
        """The step of the newest committed checkpoint; 0 while there is none."""
        for name in list_checkpoints(self.run):
            try:
                return read_manifest(self.run.checkpoint(name)).step
            except (LayoutError, OSError):
                continue
        return 0

    def allocations(self) -> list[tuple[str, str, str]]:
        """Its Slurm allocations that are not ended: (id, partition, nodes)."""
        return [
            (number, partition, nodes)
            for number, name, state, partition, nodes in self.lab.squeue()
            if name.startswith(f"{self.name}-{self.id}-") and state in ("RUNNING", "PENDING", "COMPLETING")
        ]

    def allocation(self) -> tuple[str, str, str]:
        """Its newest Slurm allocation: (id, partition, nodes)."""
        return max(self.allocations(), key=lambda found: int(found[0]))

    def scancel(self) -> str:
        """Take its allocation away as Slurm does: SIGTERM, then SIGKILL. Returns the allocation's id."""
        number = self.allocation()[0]
        call("scancel", number)
        self.lab.note(f"{self.name}: scancel")
        return number

    @contextlib.contextmanager
    def slowed(self) -> Iterator[None]:
        """Let its ranks run for 40 ms of each second: the training is alive, and not over before this is."""
        ranks = [pid for pid in processes_of(self.allocation()[0]) if _trains(pid)]
        assert ranks, self.story()
        over = threading.Event()

        def slow() -> None:
            while alive := [pid for pid in ranks if not over.is_set() and _trains(pid)]:
                kill(alive, signal.SIGSTOP)
                over.wait(0.96)
                kill(alive, signal.SIGCONT)
                over.wait(0.04)

        thread = threading.Thread(target=slow, daemon=True, name=f"slow {self.name}")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def power_off(self) -> str:
        """Take its machines away without a word: SIGKILL to all that runs there. Returns the allocation's id."""
        number = self.allocation()[0]
        killed = processes_of(number)
        kill(killed, signal.SIGKILL)
        call("scancel", number)
        self.lab.note(f"{self.name}: power off, {len(killed)} processes")
        return number

    def wait(self, *statuses: str, seconds: float = PATIENCE_S) -> str:
        """Wait until its status is one of these (none given: until it has ended); returns the status."""
        wanted = set(statuses) or ENDED

        def arrived() -> str | None:
            status = self.status
            if status not in wanted and status in ENDED:
                raise AssertionError(f"{self.name} ended as {status}, not {' or '.join(statuses)}\n{self.story()}")
            return status if status in wanted else None

        status = str(until(f"{self.name} is {' or '.join(sorted(wanted))}", arrived, seconds, self.story))
        self.lab.note(f"{self.name}: {status}")
        return status

    def wait_committed(self, step: int, seconds: float = PATIENCE_S) -> int:
        """Wait for a committed checkpoint of at least this step; returns its step."""

        def there() -> int:
            found = self.committed_step()
            if found < step and self.status in ENDED:
                raise AssertionError(f"{self.name} ended before step {step}\n{self.story()}")
            return found if found >= step else 0

        found = int(until(f"{self.name} has committed step {step}", there, seconds, self.story))
        self.lab.note(f"{self.name}: committed step {found}, attempt {len(self.attempts())}")
        return found

    def wait_attempts(self, count: int, seconds: float = PATIENCE_S) -> None:
        """Wait until the run has had so many attempts."""
        until(f"{self.name}: attempt {count}", lambda: len(self.attempts()) >= count, seconds, self.story)
        self.lab.note(f"{self.name}: attempt {count} begins")

    def log(self) -> str:
        """What the job printed, as `sky jobs logs` shows it."""
        done = self.lab.sky("jobs", "logs", self.id, "--no-follow", check=False)
        return done.stdout + done.stderr

    def story(self) -> str:
        """All that helps to see why it is not where it should be."""
        parts = [json.dumps(self.record(), indent=1, default=str), f"squeue: {self.lab.squeue()}"]
        for index, attempt in enumerate(self.attempts()):
            parts.append(f"{attempt}: {json.dumps(self.events(index).get('end'), default=str)}")
        for path in HOME.glob(f"sky_logs/jobs_controller/{self.id}.log"):
            parts.append("controller:\n" + path.read_text(errors="replace")[-3000:])
        try:
            parts.append("job:\n" + self.log()[-3000:])
        except subprocess.TimeoutExpired:  # while a job is starting there is no log, and `sky` waits for one
            parts.append("job: no log yet")
        return "\n".join(parts)


def _trains(pid: int) -> bool:
    """Whether a process is a rank of the bundled trainer's."""
    try:
        return b"trainer.finetune" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
