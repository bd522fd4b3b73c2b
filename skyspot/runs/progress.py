"""The progress of a run, and the configuration that binds it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from skyspot.runs import workers
from skyspot.runs.limits import DEADLINE, MAX_SPEND, late_note, limit_note
from skyspot.runs.location import reading
from trainer.layout.documents import LayoutError
from trainer.layout.events import event_named, read_events, read_progress
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import AttemptName, RunPaths, list_attempts, list_checkpoints


@dataclass(frozen=True)
class Progress:
    """The progress of a run."""

    attempts: int
    step: int | None
    max_steps: int | None
    loss: float | None
    committed_step: int | None
    committed_at: float | None
    """When the newest checkpoint was committed: unix seconds by the node's clock."""
    finished: bool
    cause: str | None
    """The cause of the newest attempt's end; None while it runs."""
    limit: Mapping[str, Any] = field(default_factory=dict)
    """The newest attempt's event `limit`: its numbers, where a limit ended it; empty otherwise."""
    late: Mapping[str, Any] = field(default_factory=dict)
    """Its event `too-late-for-spot`, while it runs; empty otherwise."""

    def limits_note(self, run: str) -> str:
        """What limits have done to the run, or will do, in a sentence; empty if nothing.

        Args:
            run: The run's name.
        """
        return "" if self.finished else limit_note(self.limit, run) or late_note(self.late, run)


def run_progress(paths: RunPaths) -> Progress | None:
    """The progress of a run; None if no attempt has started.

    Raises:
        UnreadableError: the bucket refused to be read, or did not answer.
    """
    return workers.call(paths.root, _progress, paths, seconds=workers.TIMEOUT_S)


def _progress(paths: RunPaths) -> Progress | None:
    with reading(paths):
        attempts = list_attempts(paths)
        if not attempts:
            return None
        newest = attempts[-1]
        now = read_progress(paths, newest)
        events = read_events(paths, newest)
        end, restored = event_named(events, "end"), event_named(events, "restored") or {}
        saved = event_named(events, "saved") or {}
        finished = _final_manifest(paths) is not None
        step = now.get("step", restored.get("step"))
        committed = saved.get("step", restored.get("step") or None)
        at = saved.get("time")
        if at is None and committed:
            at = _saved_at(paths, attempts, committed)
        return Progress(
            attempts=len(attempts),
            step=_int(step),
            max_steps=_int(now.get("max_steps")),
            loss=now["loss"] if isinstance(now.get("loss"), float) else None,
            committed_step=_int(committed),
            committed_at=float(at) if isinstance(at, (int, float)) else None,
            finished=finished,
            cause=str(end.get("cause")) if end else None,
            limit=(event_named(events, "limit") or {}) if end and end.get("cause") in (MAX_SPEND, DEADLINE) else {},
            late=(event_named(events, "too-late-for-spot") or {}) if not end else {},
        )


def _saved_at(paths: RunPaths, attempts: list[AttemptName], step: Any) -> Any:
    """When an earlier attempt committed a checkpoint."""
    for attempt in reversed(attempts):
        for event in reversed(read_events(paths, attempt)):
            if event.name == "saved" and event.fields.get("step") == step:
                return event.fields.get("time")
    return None


def _final_manifest(paths: RunPaths) -> Manifest | None:
    """The manifest of `final/`; None until it is written."""
    try:
        return read_manifest(paths.final)
    except (LayoutError, OSError):
        return None


def run_binding(paths: RunPaths) -> Mapping[str, Any]:
    """The configuration that a run may not change, by field; empty if no attempt has started.

    The source is the trainer's: the newest committed checkpoint or, without one, the first attempt that was not
    refused.

    Raises:
        UnreadableError: the bucket refused to be read, or did not answer.
    """
    return workers.call(paths.root, _binding, paths, seconds=workers.TIMEOUT_S)


def _binding(paths: RunPaths) -> Mapping[str, Any]:
    with reading(paths):
        return _bound(paths)


def _bound(paths: RunPaths) -> Mapping[str, Any]:
    for name in list_checkpoints(paths):
        with suppress(LayoutError, OSError):
            found = read_manifest(paths.checkpoint(name)).facts.get("binding")
            if isinstance(found, Mapping):
                return found
    for attempt in list_attempts(paths):
        events = read_events(paths, attempt)
        start = event_named(events, "start") or {}
        if (event_named(events, "end") or {}).get("cause") != "refused" and isinstance(start.get("binding"), Mapping):
            return dict(start["binding"])
    return {}


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
