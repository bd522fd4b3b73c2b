"""Tracker: what a tracker of ours can do, what it is told of the run, and how its files get into the bucket."""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.layout.names import AttemptName, RunPaths, file_safe, list_attempts, names_in
from trainer.trackers.curve import Point

THREAD = "tracker"
"""The name of a thread that calls a tracker of ours."""


@dataclass(frozen=True)
class Tracked:
    """The run, as trackers are told of it."""

    paths: RunPaths
    attempt: AttemptName
    id: str
    """The run's name in every tracker, the same in all attempts."""
    config: Mapping[str, Any]
    """The settings, for readers."""


class Tracker(Protocol):
    """One tracker, in one attempt. A single thread calls it, so a call may take long."""

    name: str
    rewinds: bool
    """It can drop steps that it has. One that cannot gets a step once a later one is committed: none is done twice."""

    def start(self) -> int:
        """Begin; returns the first step that it lacks, 0 where it is to get the whole curve anew."""

    def where(self) -> str:
        """Where the curve is seen, for a line."""

    def log(self, point: Point) -> None:
        """Take a point; those of one step may come in several calls, and no earlier step follows."""

    def publish(self) -> None:
        """Put what it has so far where it outlives this machine."""

    def finish(self, publish: bool) -> None:
        """End.

        Args:
            publish: Whether to publish once more. False: it has not got the whole curve.
        """


def tracked(paths: RunPaths, attempt: AttemptName, config: Mapping[str, Any]) -> Tracked:
    """The run as trackers are told of it. The id is the folder's name and the random part of the first attempt's name.

    So all attempts find it in the run's records, and two runs with one name do not share it.

    Raises:
        OSError: the bucket cannot be read.
    """
    first = min([*list_attempts(paths), attempt])
    return Tracked(paths, attempt, f"{file_safe(paths.root.name)[:48].strip('.-') or 'run'}-{first.token}", config)


def free_accelerates_logger() -> None:
    """Let accelerate's trackers work here without an `Accelerator`: their logger raises until there is one.

    In all other threads it stays what it is: trackers of the program's own log through it too.
    """
    from accelerate import tracking
    from accelerate.logging import MultiProcessAdapter

    class Logger(MultiProcessAdapter):  # type: ignore[misc]  # accelerate has no types.
        def log(self, *args: Any, **options: Any) -> None:
            if threading.current_thread().name != THREAD:
                super().log(*args, **options)

    tracking.logger = Logger(logging.getLogger(tracking.__name__), {})


def copy_whole(source: Path, target: Path) -> None:
    """Write a file in one go, from its first byte to its last: no mount has to append or to seek.

    Raises:
        OSError: the bucket refuses it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 20)


class Snapshots:
    """Copies of a tracker's files, each in a folder of its own: `<run>/<tracker>/<attempt's number>-<n>-<attempt>/`."""

    _NAME = re.compile(r"\d{9}-\d{6}-a\d{4,9}-[0-9a-f]{6}")

    def __init__(self, folder: Path, attempt: AttemptName) -> None:
        self._folder, self._attempt, self._number = folder, attempt, 0

    def add(self, files: Mapping[str, Path]) -> None:
        """Copy files, by their path in the snapshot; older snapshots are deleted once all are there.

        Raises:
            OSError: the bucket refuses one.
        """
        self._number += 1
        name = f"{self._attempt.number:09d}-{self._number:06d}-{self._attempt}"
        for path, source in files.items():
            copy_whole(source, self._folder / name / path)
        for other in names_in(self._folder):
            if self._NAME.fullmatch(other) and other < name:
                with suppress(OSError):
                    shutil.rmtree(self._folder / other)
