"""The ways to lose a machine, and when: a seeded schedule, and the watch that strikes at the right instant."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.layout.documents import LayoutError
from trainer.layout.events import event_named, read_events, read_metrics
from trainer.layout.manifest import read_manifest
from trainer.layout.names import MANIFEST, AttemptName, RunPaths, list_attempts, list_checkpoints, list_metrics

KINDS = ("kill", "aws-notice", "sigterm", "kill-in-save", "torn")


@dataclass(frozen=True)
class Preemption:
    """One loss of a machine."""

    kind: str
    at_step: int | None = None
    """Strike when this many steps of the run are done."""
    after_resume: int | None = None
    """Strike so many steps after the attempt's first."""
    at_fraction: float | None = None
    """Of the seconds that the undisturbed run went on after its first write, counted from the attempt's first write:
    for tasks that say nothing of steps."""


def schedule(kinds: list[str], count: int, seed: int, *, steps: int | None, first_save: int | None) -> list[Preemption]:
    """Where a run of so many steps loses its machines.

    The first comes before the first checkpoint, and one within three steps of a resume; the others are spread over the
    run. Kinds take turns, each at least once where there are enough preemptions.

    Args:
        kinds: Which kinds.
        count: How many preemptions.
        seed: Of the exact steps.
        steps: How many steps the run has; None where the task does not say.
        first_save: The step of its first checkpoint, where that is known.
    """
    dice = random.Random(seed)
    ordered = [kind for kind in KINDS if kind in kinds]
    taken = [ordered[number % len(ordered)] for number in range(count)]
    if steps is None:
        # Each attempt goes on where the last one was: all of them together must not reach the end.
        return [Preemption(kind, at_fraction=dice.uniform(0.2, 0.8) / (count + 1)) for kind in taken]
    found = []
    for number, kind in enumerate(taken):
        if number == 0 and kind in ("kill", "sigterm", "aws-notice") and first_save and first_save > 1:
            found.append(Preemption(kind, at_step=dice.randint(1, max(1, first_save - 1))))
        elif number == 2:
            found.append(Preemption(kind, after_resume=dice.randint(1, 3)))
        else:
            low, high = steps * number // (count + 1), steps * (number + 1) // (count + 1)
            found.append(Preemption(kind, at_step=max(1, dice.randint(low, max(low, high - 1)))))
    return found


class Watch:
    """What one attempt on one machine has done so far, read from its bucket."""

    def __init__(self, bucket: Path, run_folder: str | None) -> None:
        """Watch from before the attempt starts."""
        self.bucket, self.run_folder = bucket, run_folder
        self._before = {str(name) for name in self._attempts()}
        self._files_before = self._files()
        self.alive_since: float | None = None
        """When the attempt was first seen to write into its bucket, on the monotonic clock."""
        self._file: Path | None = None
        self._read = 0
        self.first_step: int | None = None
        self.step: int | None = None

    @property
    def paths(self) -> RunPaths | None:
        """The run's folder; None while there is none."""
        return find_run(self.bucket, self.run_folder)

    def _attempts(self) -> list[AttemptName]:
        paths = self.paths
        return list_attempts(paths) if paths else []

    def attempt(self) -> AttemptName | None:
        """The attempt that began since; None while there is none."""
        new = [name for name in self._attempts() if str(name) not in self._before]
        return new[0] if new else None

    def look(self) -> int | None:
        """The last step that this attempt is known to have done; None while it has done none."""
        paths, attempt = self.paths, self.attempt()
        if not paths or not attempt:
            return None
        files = list_metrics(paths, attempt)
        if not files:
            return None
        if files[-1][1] != self._file:
            self._file, self._read = files[-1][1], 0
        with self._file.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        steps = [line["step"] for line in read_metrics(whole) if "loss" in line]
        if steps:
            self.first_step = self.first_step if self.first_step is not None else steps[0]
            self.step = steps[-1]
        return self.step

    def saving(self) -> bool:
        """Whether a checkpoint is being written at this instant."""
        paths = self.paths
        if paths and paths.checkpoints.is_dir():
            return any(not (paths.checkpoint(name) / MANIFEST).exists() and self._is_new(str(name))
                       for name in list_checkpoints(paths)[:3])  # fmt: skip
        if paths and paths.attempts.is_dir():
            return False
        return bool(self._files() - self._files_before)

    def _is_new(self, name: str) -> bool:
        attempt = self.attempt()
        return attempt is not None and f"-{attempt}-" in name

    def alive_s(self) -> float:
        """Seconds since the attempt was first seen to write into its bucket; 0 before."""
        if self.alive_since is None and self._files() != self._files_before:
            self.alive_since = time.monotonic()
        return 0.0 if self.alive_since is None else time.monotonic() - self.alive_since

    def forget_files(self) -> None:
        """Count only what appears from now on as being written."""
        self._files_before = self._files()

    def _files(self) -> frozenset[tuple[str, int]]:
        return frozenset((path, size) for path, size in walk(self.bucket))

    def ended(self) -> bool:
        """Whether the attempt wrote its end event."""
        paths, attempt = self.paths, self.attempt()
        return bool(paths and attempt and event_named(read_events(paths, attempt), "end"))

    def committed(self) -> int:
        """How many committed checkpoints there are."""
        paths = self.paths
        return len([name for name in list_checkpoints(paths) if is_committed(paths.checkpoint(name))]) if paths else 0


def walk(folder: Path) -> list[tuple[str, int]]:
    """(path, size) of every file below a folder; one that vanishes meanwhile is left out."""
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                path = f"{root}/{name}"
                found.append((path, Path(path).stat().st_size))
            except OSError:
                continue
    return found


def is_committed(folder: Path) -> bool:
    """Whether a checkpoint's manifest is readable."""
    try:
        read_manifest(folder)
    except (LayoutError, OSError):
        return False
    return True


def find_run(bucket: Path, run_folder: str | None) -> RunPaths | None:
    """The run's folder in a bucket: the named one, or the first that holds attempts."""
    if run_folder is not None and (bucket / run_folder / "attempts").is_dir():
        return RunPaths(bucket / run_folder)
    for depth in ("attempts", "*/attempts", "*/*/attempts"):
        for found in sorted(bucket.glob(depth)):
            return RunPaths(found.parent)
    return None


def tear(bucket: Path, run_folder: str | None) -> str | None:
    """Tear the newest checkpoint, as a mount does that was cut off: half of its largest file is gone.

    Of a task without our layout, the newest file in the bucket. Returns what was torn; None where there is nothing.
    """
    paths = find_run(bucket, run_folder)
    if paths:
        names = [name for name in list_checkpoints(paths) if is_committed(paths.checkpoint(name))]
        if not names:
            return None
        folder = paths.checkpoint(names[0])
        victim = max((path for path in folder.iterdir() if path.name != MANIFEST), key=lambda path: path.stat().st_size)
    else:
        files = [Path(path) for path, size in walk(bucket) if size > 1]
        if not files:
            return None
        victim = max(files, key=lambda path: path.stat().st_mtime_ns)
    os.truncate(victim, victim.stat().st_size // 2)
    return victim.relative_to(bucket).as_posix()


def wait_for_save(watch: Watch, seconds: float, goes_on: Callable[[], bool]) -> bool:
    """Spin until a checkpoint is being written, or `goes_on` says no; a save of a small model lasts milliseconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            if watch.saving():
                return True
            time.sleep(0.0005)
        if not goes_on():
            return False
    return False
