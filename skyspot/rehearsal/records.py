"""What a task's attempt records tell of its attempts; empty for a task without skyspot's trainer."""

from __future__ import annotations

from typing import Any

from skyspot.rehearsal.result import Row
from skyspot.rehearsal.verdict import History
from skyspot.rehearsal.watch import Watch
from trainer.layout.events import event_named, read_events
from trainer.layout.names import RunPaths, list_attempts


def first_save(paths: RunPaths | None) -> int | None:
    """The step of a run's first checkpoint."""
    for name in list_attempts(paths) if paths else []:
        for event in read_events(paths, name) if paths else []:
            if event.name == "saved" and isinstance(event.fields.get("step"), int):
                return int(event.fields["step"])
    return None


def fill(row: Row, watch: Watch) -> None:
    """Copy an attempt's records into its row."""
    paths, attempt = watch.paths, watch.attempt()
    if not paths or not attempt:
        return
    watch.look()
    events = read_events(paths, attempt)
    first, end = event_named(events, "first-step") or {}, event_named(events, "end") or {}
    row.restored_step = restored_step(watch)
    row.first_step, row.last_step = _int(first.get("step")), watch.step
    row.first_step_s = _float(first.get("seconds"))
    row.committed_s = _float(end.get("committed_s"))


def restored_step(watch: Watch) -> int | None:
    """The step that an attempt resumed from."""
    paths, attempt = watch.paths, watch.attempt()
    events = read_events(paths, attempt) if paths and attempt else []
    return _int((event_named(events, "restored") or {}).get("step"))


def goodput(history: History | None, seconds: float) -> float | None:
    """The share of a leg's time that went into steps of the final history."""
    if not history or not seconds:
        return None
    return sum(float(line.get("step_s") or 0.0) for line in history.lines.values()) / seconds


def set_lost_steps(row: Row | None, restored: int | None) -> None:
    """Set an attempt's lost steps, which are known once the next attempt has resumed."""
    if row and row.last_step is not None and restored is not None:
        row.lost_steps = max(0, row.last_step - restored)


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
