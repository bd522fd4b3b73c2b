"""The records of a run's attempts: every event and every line of metrics, and what of them is torn or missing.

A listing gives all sizes in one request; each file then costs a request of its own, several at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from skyspot.runs import workers
from skyspot.runs.listing import read_listed, sizes_below
from skyspot.runs.location import reading
from skyspot.runs.workers import in_order
from trainer.layout.documents import LayoutError, from_json
from trainer.layout.events import Event, number, parse_event, read_metrics
from trainer.layout.manifest import read_manifest
from trainer.layout.names import AttemptName, RunPaths

READ_S = 300.0
"""Longest time for all records of a run."""
READERS = 16
_PROGRESS, _METRICS = "progress.json", ("metrics-", ".jsonl")
_MAX_STEP = 10**12


class Line(NamedTuple):
    """A line of metrics; None and 0: not recorded. A tuple, because a run has many."""

    step: int
    is_step: bool
    """False for a line that only tells of an evaluation after that step."""
    step_s: float | None
    ended: float | None
    """When the step ended, on the monotonic clock of its machine."""
    save_s: float
    """The part of `step_s` in which training waited for saves."""
    data_s: float | None
    """The part of `step_s` in which training waited for samples."""
    eval_s: float
    """Of an evaluation after the step, or within `step_s`, if `is_step`."""
    loss: float | None
    lr: float | None


@dataclass(frozen=True)
class AttemptRecords:
    """The records of one attempt, as they are: any value of an event may be of any type."""

    name: AttemptName
    events: tuple[Event, ...]
    """In order."""
    lines: tuple[Line, ...]
    """In the order in which they were written."""
    progress: Mapping[str, Any]
    problems: tuple[str, ...]
    """What is torn or missing, each as a part of a sentence."""

    def event(self, name: str) -> Mapping[str, Any]:
        """The fields of the last event with that name; empty if there is none."""
        return next((event.fields for event in reversed(self.events) if event.name == name), {})

    def events_named(self, name: str) -> list[Mapping[str, Any]]:
        """The fields of all events with that name."""
        return [event.fields for event in self.events if event.name == name]


@dataclass(frozen=True)
class RunRecords:
    """The records of a run."""

    root: str
    attempts: tuple[AttemptRecords, ...]
    """Oldest first."""
    finished: bool
    """The model is exported."""


def read_records(paths: RunPaths) -> RunRecords:
    """The records of a run, which may be training.

    Raises:
        UnreadableError: the folder cannot be read from this machine.
        NoAnswerError: it was not read in time.
    """
    return workers.call(paths.root, _read, paths, seconds=READ_S)


def _read(paths: RunPaths) -> RunRecords:
    with reading(paths):
        sizes: dict[AttemptName, dict[str, int]] = {}
        for path, size in sizes_below(paths.attempts).items():
            folder, _, file = path.partition("/")
            if file and (name := AttemptName.parse(folder)):
                sizes.setdefault(name, {})[file] = size
        files = [(name, file, size) for name in sorted(sizes) for file, size in sorted(sizes[name].items())]
        wanted = [one for one in files if parse_event(one[1]) or _is_metrics(one[1]) or one[1] == _PROGRESS]
        work = [partial(_contents, paths.attempt(name) / file, size) for name, file, size in wanted]
        found: dict[AttemptName, dict[str, bytes | None]] = {name: {} for name in sizes}
        with closing(in_order(work, READERS)) as contents:
            for (name, file, _), data in zip(wanted, contents, strict=True):
                found[name][file] = data
        finished = False
        with suppress(LayoutError, OSError):
            finished = read_manifest(paths.final).kind == "final"
        return RunRecords(str(paths.root), tuple(parse_attempt(name, found[name]) for name in sorted(found)), finished)


def _contents(path: Path, size: int) -> bytes | None:
    """What is in a file; None if it cannot be read. It may have grown since it was listed."""
    with suppress(LayoutError, OSError):
        return read_listed(path, size)
    return None


def _is_metrics(file: str) -> bool:
    return file.startswith(_METRICS[0]) and file.endswith(_METRICS[1])


def parse_attempt(name: AttemptName, files: Mapping[str, bytes | None]) -> AttemptRecords:
    """An attempt's records, from the contents of its files by name; None: the file cannot be read."""
    events, lines, problems = [], [], []
    for file in sorted(files):
        data = files[file]
        if found := parse_event(file):
            fields = _object(data)
            if fields is None:
                problems.append(f"{file} {'cannot be read' if data is None else 'is torn'}")
            else:
                events.append(Event(found[0], found[1], fields))
        elif _is_metrics(file):
            lines += (read := list(read_metrics(data or b"")))
            if data is None:
                problems.append(f"{file} cannot be read")
            elif len(read) < sum(bool(line) for line in data.split(b"\n")):
                after = f"after the line of step {read[-1]['step']}" if read else "in its first line"
                problems.append(f"{file} is torn {after}")
    events.sort(key=lambda event: (event.number, event.name))
    numbers = {found[0] for file in files if (found := parse_event(file))}
    missing = sorted(set(range(1, max(numbers, default=0) + 1)) - numbers)
    problems += [f"events {_ranges(missing)} are missing"] if missing else []
    problems += [] if any(event.name == "start" for event in events) else ["it has no start event"]
    parsed = [_line(line) for line in lines if 0 <= line["step"] < _MAX_STEP]
    steps = sorted({line.step for line in parsed if line.is_step})
    gaps = [step for before, step in pairwise(steps) if step - before > 1]
    problems += [f"its metrics have no line before step {gaps[0]}"] if gaps else []
    return AttemptRecords(
        name, tuple(events), tuple(parsed), _object(files.get(_PROGRESS)) or {}, tuple(problems)
    )  # fmt: skip


def _object(data: bytes | None) -> dict[str, Any] | None:
    with suppress(LayoutError):
        found = from_json(data or b"", allows_nan=True)
        return found if isinstance(found, dict) else None
    return None


def _line(fields: Mapping[str, Any]) -> Line:
    return Line(
        step=fields["step"],
        is_step="step_s" in fields or not ("eval_s" in fields or "eval_loss" in fields),
        step_s=number(fields, "step_s"),
        ended=number(fields, "monotonic"),
        save_s=number(fields, "save_s") or 0.0,
        data_s=number(fields, "data_s"),
        eval_s=number(fields, "eval_s") or 0.0,
        loss=number(fields, "loss", -1e300, 1e300),
        lr=number(fields, "lr", -1e300, 1e300),
    )


def whole(fields: Mapping[str, Any], key: str) -> int | None:
    """A whole number of a record, from 0; None if it is missing or something else."""
    value = fields.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_STEP else None


def text(fields: Mapping[str, Any], key: str, limit: int = 100) -> str:
    """A text of a record, cut; empty if it is missing or something else. It may hold any character."""
    value = fields.get(key)
    return value[:limit] if isinstance(value, str) else ""


def _ranges(numbers: Iterable[int]) -> str:
    """`2, 4-6`."""
    parts: list[list[int]] = []
    for one in numbers:
        if parts and one == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], one]
        else:
            parts.append([one])
    return ", ".join("-".join(map(str, dict.fromkeys(part))) for part in parts[:5]) + (", ..." if parts[5:] else "")
