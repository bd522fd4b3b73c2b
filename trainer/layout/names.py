"""Names and paths in a run's folder, and listings of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MANIFEST = "MANIFEST.json"
STATE = "state.json"
"""The file that every checkpoint has beside its shares."""
FINAL = "final"
"""The folder of the finished run's model."""

_ATTEMPT = re.compile(r"a(\d{4,9})-([0-9a-f]{6})")
_CHECKPOINT = re.compile(r"(\d{10})-(a\d{4,9}-[0-9a-f]{6})-(\d{1,6})")
_METRICS = re.compile(r"metrics-(\d{10})\.jsonl")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_TASK_ID = re.compile(r"sky-managed-[\d-]+_(.+)_\d+-\d+")


@dataclass(frozen=True, order=True)
class AttemptName:
    """`a0003-1f6c2e`: a number that grows, and a random part that keeps two attempts of one number apart."""

    number: int
    token: str

    def __str__(self) -> str:
        return f"a{self.number:04d}-{self.token}"

    @classmethod
    def parse(cls, text: str) -> AttemptName | None:
        """The attempt's name in `text`; None if it is none."""
        found = _ATTEMPT.fullmatch(text)
        return cls(int(found[1]), found[2]) if found else None


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`0000000040-a0003-1f6c2e-2`: ordered by step, then attempt, then save, so that the newest is the greatest."""

    step: int
    attempt: AttemptName
    save: int

    def __str__(self) -> str:
        return f"{self.step:010d}-{self.attempt}-{self.save}"

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """The checkpoint's name in `text`; None if it is none."""
        found = _CHECKPOINT.fullmatch(text)
        attempt = AttemptName.parse(found[2]) if found else None
        return cls(int(found[1]), attempt, int(found[3])) if found and attempt else None


@dataclass(frozen=True)
class RunPaths:
    """All paths in a run's folder; no other module builds them."""

    root: Path

    @property
    def run_json(self) -> Path:
        """Identity of the run."""
        return self.root / "run.json"

    @property
    def attempts(self) -> Path:
        """Folder of all attempts' records."""
        return self.root / "attempts"

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.root / "checkpoints"

    @property
    def tokens(self) -> Path:
        """Folder of all prepared data."""
        return self.root / "tokens"

    @property
    def final(self) -> Path:
        """Folder of the exported model."""
        return self.root / FINAL

    def attempt(self, attempt: AttemptName) -> Path:
        """Folder of one attempt's records."""
        return self.attempts / str(attempt)

    def event(self, attempt: AttemptName, number: int, event: str) -> Path:
        """File of one event; `number` counts from 1."""
        return self.attempt(attempt) / f"{number:04d}-{event}.json"

    def stacks(self, attempt: AttemptName, rank: int) -> Path:
        """The stacks of a rank's threads, where the attempt ended because training hung."""
        return self.attempt(attempt) / f"stacks-{rank}.txt"

    def progress(self, attempt: AttemptName) -> Path:
        """The attempt's small, rewritten progress file."""
        return self.attempt(attempt) / "progress.json"

    def metrics(self, attempt: AttemptName, first_step: int) -> Path:
        """The metrics file that begins with the line of `first_step`."""
        return self.attempt(attempt) / f"metrics-{first_step:010d}.jsonl"

    def checkpoint(self, name: CheckpointName) -> Path:
        """Folder of one checkpoint."""
        return self.checkpoints / str(name)

    def tracker(self, name: str) -> Path:
        """Folder of what an experiment tracker shows of the run; nothing that the run needs."""
        return self.root / name

    def stop(self, launch: str) -> Path:
        """The request to save and stop, for every attempt of `launch`."""
        return self.root / "stop" / f"{file_safe(launch)}.json"


def is_safe_name(name: str) -> bool:
    """True if a file name in a manifest stays inside the manifest's folder."""
    parts = PurePosixPath(name).parts
    return (
        0 < len(name) <= 512
        and name.isprintable()
        and "\\" not in name
        and not name.startswith("/")
        and str(PurePosixPath(name)) == name
        and ".." not in parts
        and name not in (".", MANIFEST)
    )


def file_safe(text: str) -> str:
    """`text` as part of a file name: anything unusual becomes `_`, at most 120 characters."""
    return _UNSAFE.sub("_", text)[:120] or "_"


def run_name(launch: str) -> str:
    """The run's name in a launch id that is SkyPilot's id of the task; empty if it is another one."""
    found = _TASK_ID.fullmatch(launch)
    return found[1] if found else ""


def names_in(folder: Path) -> list[str]:
    """The names of a folder's entries; empty if there is no folder."""
    try:
        return [entry.name for entry in folder.iterdir()]  # Not os.scandir: on a laptop the folder may be a bucket.
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_attempts(paths: RunPaths) -> list[AttemptName]:
    """All attempts that have a folder, oldest first."""
    return sorted(name for name in map(AttemptName.parse, names_in(paths.attempts)) if name)


def list_checkpoints(paths: RunPaths) -> list[CheckpointName]:
    """All checkpoint folders, committed or not, newest first."""
    return sorted((name for name in map(CheckpointName.parse, names_in(paths.checkpoints)) if name), reverse=True)


def list_metrics(paths: RunPaths, attempt: AttemptName) -> list[tuple[int, Path]]:
    """An attempt's metrics files as (first step, path), in the order of steps."""
    found = [(_METRICS.fullmatch(name), name) for name in names_in(paths.attempt(attempt))]
    return sorted((int(match[1]), paths.attempt(attempt) / name) for match, name in found if match)
