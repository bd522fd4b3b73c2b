"""The progress of one attempt on one machine, read from its bucket."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from trainer.layout.documents import LayoutError
from trainer.layout.events import event_named, read_events, read_metrics
from trainer.layout.manifest import read_manifest
from trainer.layout.names import MANIFEST, AttemptName, RunPaths, list_attempts, list_checkpoints, list_metrics


class Watch:
    """Reads from the bucket how far one attempt on one machine has come."""

    def __init__(self, bucket: Path, run_folder: str | None, view: Path | None = None) -> None:
        """Start watching, before the attempt starts.

        Args:
            bucket: The bucket.
            run_folder: The run's folder in it, if the task names one.
            view: The bucket as the machine sees it, with files that have not arrived yet; None: it sees the bucket.
        """
        self.bucket, self.run_folder, self._view = bucket, run_folder, view
        self._before = {str(name) for paths in list_runs(bucket) for name in list_attempts(paths)}
        self._own: RunPaths | None = None
        self._files_before = self._files()
        self.alive_since: float | None = None
        """Time of the attempt's first observed write to its bucket, on the monotonic clock."""
        self._file: Path | None = None
        self._read = 0
        self.first_step: int | None = None
        self.step: int | None = None

    @property
    def paths(self) -> RunPaths | None:
        """The run's folder, the one with this attempt if there are several; None until it exists."""
        if self._view and self._view.is_dir():
            return find_run(self._view, self.run_folder)
        if self._own is None:
            runs = list_runs(self.bucket)
            self._own = next((paths for paths in runs if self._new(paths)), None)
            return self._own or named_run(self.bucket, self.run_folder) or next(iter(runs), None)
        return self._own

    def _new(self, paths: RunPaths) -> list[AttemptName]:
        """The attempts in a run's folder that started since then."""
        return [name for name in list_attempts(paths) if str(name) not in self._before]

    def attempt(self) -> AttemptName | None:
        """The attempt that started since then; None until it exists."""
        return self._attempt_in(self.paths)

    def _attempt_in(self, paths: RunPaths | None) -> AttemptName | None:
        return next(iter(self._new(paths)), None) if paths else None

    def look(self) -> int | None:
        """Return the last known step of this attempt; None before its first step."""
        paths = self.paths  # Once: to find it, the bucket's folders are listed, and this is called 100 times a second.
        attempt = self._attempt_in(paths)
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
            self.step = max(self.step or 0, steps[-1])
        return self.step

    def saving(self) -> bool:
        """True if a checkpoint is being written right now."""
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
        """Return the seconds since the attempt's first observed write to its bucket; 0 before that."""
        if self.alive_since is None and self._files() != self._files_before:
            self.alive_since = time.monotonic()
        return 0.0 if self.alive_since is None else time.monotonic() - self.alive_since

    def forget_files(self) -> None:
        """Treat only files that appear from now on as being written."""
        self._files_before = self._files()

    def _files(self) -> frozenset[tuple[str, int, int]]:
        return frozenset((path, about.st_size, about.st_mtime_ns) for path, about in _stats(self.bucket))

    def ended(self) -> bool:
        """True if the attempt wrote its end event."""
        paths, attempt = self.paths, self.attempt()
        return bool(paths and attempt and event_named(read_events(paths, attempt), "end"))

    def committed(self) -> int:
        """Count the committed checkpoints that have arrived in the bucket."""
        paths = find_run(self.bucket, self.run_folder)
        return len([name for name in list_checkpoints(paths) if is_committed(paths.checkpoint(name))]) if paths else 0


def walk(folder: Path) -> list[tuple[str, int]]:
    """List (path, size) of every file below a folder; a file that vanishes meanwhile is left out."""
    return [(path, about.st_size) for path, about in _stats(folder)]


def _stats(folder: Path) -> list[tuple[str, os.stat_result]]:
    found = []
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                path = f"{root}/{name}"
                found.append((path, Path(path).stat()))
            except OSError:
                continue
    return found


def is_committed(folder: Path) -> bool:
    """True if a checkpoint's manifest is readable."""
    try:
        read_manifest(folder)
    except (LayoutError, OSError):
        return False
    return True


def find_run(bucket: Path, run_folder: str | None) -> RunPaths | None:
    """Find the run's folder in a bucket: the named one, or the first that holds attempts."""
    return named_run(bucket, run_folder) or next(iter(list_runs(bucket)), None)


def named_run(bucket: Path, run_folder: str | None) -> RunPaths | None:
    """The named folder in a bucket, if it holds attempts."""
    if run_folder is not None and (bucket / run_folder / "attempts").is_dir():
        return RunPaths(bucket / run_folder)
    return None


def list_runs(bucket: Path) -> list[RunPaths]:
    """List the folders in a bucket that hold attempts."""
    depths = ("attempts", "*/attempts", "*/*/attempts")
    return [RunPaths(found.parent) for depth in depths for found in sorted(bucket.glob(depth))]


def wait_for_save(watch: Watch, seconds: float, goes_on: Callable[[], bool]) -> bool:
    """Poll until a checkpoint is being written or `goes_on` is false; a small model's save takes milliseconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            if watch.saving():
                return True
            time.sleep(0.0005)
        if not goes_on():
            return False
    return False
