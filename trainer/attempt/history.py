"""History of a run: how earlier attempts ended, where, and whether they made progress. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.attempt import ending
from trainer.attempt.record import Attempt
from trainer.bucket import deadlines
from trainer.errors import AttemptError
from trainer.layout.documents import (
    LayoutError,
    LayoutVersionError,
)
from trainer.layout.events import Event, event_named, read_events
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.identity import is_of
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import AttemptName, RunPaths, list_attempts

RECORDS_S = 600.0
"""The time that reading other attempts' records may take: each attempt has several small objects in the bucket."""
OWN_DOING_IN_A_ROW = 3
"""So many attempts in a row that ended by themselves, without progress, end the launch."""
ANY_END_IN_A_ROW = 10
"""So many attempts in a row without progress, however they ended, end the launch."""


def machines(events: list[Event]) -> set[str]:
    """The tokens of an attempt's machines, as far as they are recorded."""
    found = {str((event_named(events, "start") or {}).get("machine"))}
    listed = (event_named(events, "machines") or {}).get("machines")
    return found | set(map(str, listed if isinstance(listed, list) else []))


def is_finished(
    paths: RunPaths, run_id: str | None, binding: Mapping[str, Any], problem: Callable[[Path, Manifest], str | None]
) -> bool:
    """True if `final/` is whole, and holds a model trained for exactly the requested length.

    Args:
        paths: The run's paths.
        run_id: This run's id.
        binding: This run's binding. Its `max_steps` and `epochs`, if known, say where training ends.
        problem: Reads and hashes a folder's files; returns the first problem.

    Raises:
        AttemptError: `final/` holds another run's model, which the export would delete.
        OSError: `final/` cannot be read.
    """
    try:
        manifest = deadlines.read_manifest(paths.final)
    except LayoutVersionError:
        raise
    except LayoutError:
        return False
    if not is_of(manifest, run_id):
        raise AttemptError(
            f"{paths.final} holds the model of another run ({manifest.facts['run_id']}; this run is {run_id}). Move "
            "that folder away, or use another run name or folder. Nothing in it was changed"
        )
    if manifest.kind != "final" or manifest.facts.get("step") != manifest.facts.get("max_steps"):
        return False
    then = manifest.facts.get("binding")
    if isinstance(then, Mapping) and any(then.get(key) != binding.get(key) for key in ("max_steps", "epochs")):
        return False
    return problem(paths.final, manifest) is None


def ended(events: list[Event]) -> Mapping[str, Any]:
    """The fields of an attempt's end event; empty if it has none."""
    return event_named(events, "end") or {}


def _by_own_doing(events: list[Event], machine: str) -> bool:
    """True if an attempt ended by itself: with 75 and without a notice, or without an end event, on this machine.

    One whose micro-batch was too large does not count: the next one begins with a smaller one.
    """
    end = ended(events)
    if not end:
        return machine in machines(events)
    if end.get("micro_batch_too_large"):
        return False
    return end.get("code") == EXIT_PREEMPTED and end.get("cause") not in (ending.NOTICE.cause, ending.SIGNAL.cause)


def no_progress(attempt: Attempt, newest_step: int, *, sees_progress: bool = True) -> str | None:
    """The reason to end this launch for good: its attempts make no progress. None if they do.

    It ends after three attempts in a row that ended by themselves, or ten that ended in any way, if there is no
    checkpoint above the one that the first of them restored, and no newly prepared data.

    Args:
        attempt: The attempt that has just begun.
        newest_step: The step that it will restore.
        sees_progress: Whether the script's checkpoints are visible in the run's folder. If not, ten preemptions of a
            healthy run look like no progress, so only attempts that ended by themselves count.
    """
    before: list[tuple[AttemptName, list[Event]]] = []
    for name in reversed(list_attempts(attempt.paths)):
        if name >= attempt.name:
            continue
        events = read_events(attempt.paths, name, ("start", "machines", "restored", "end"))
        if (event_named(events, "start") or {}).get("launch") != attempt.launch:
            break
        before.append((name, events))
    for count, own in ((OWN_DOING_IN_A_ROW, True), (ANY_END_IN_A_ROW, False)):
        row = before[:count]
        if not own and not sees_progress:
            continue
        if len(row) < count or (own and not all(_by_own_doing(events, attempt.machine) for _, events in row)):
            continue
        if newest_step > _restored_step(row[-1][1]) or _new_tokens(attempt.paths, {str(name) for name, _ in row}):
            continue
        how = "ended by themselves" if own else "ended"
        return (
            f"no progress: {count} attempts in a row {how} at step {newest_step}. Mend the cause and launch again: a "
            f"new launch counts from zero.\n{_table(list(reversed(row)))}"
        )
    return None


def _table(attempts: list[tuple[AttemptName, list[Event]]]) -> str:
    """How attempts ended, a line each: name, cause, code and last error, in columns."""
    rows = [("attempt", "ended by", "code", "last error")]
    for name, events in attempts:
        end = ended(events)
        rows.append((str(name), str(end.get("cause", "-")), str(end.get("code", "-")), _last_error(events)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  " + "  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows)


def _restored_step(events: list[Event]) -> int:
    restored, start = event_named(events, "restored"), event_named(events, "start")
    step = restored.get("step") if restored else (start or {}).get("newest_step")
    return step if isinstance(step, int) else 0


def _new_tokens(paths: RunPaths, attempts: Collection[str]) -> bool:
    """True if one of the attempts prepared data and committed it."""
    with suppress(OSError):
        for folder in paths.tokens.iterdir():
            if any(folder.name.endswith(f"-{name}") for name in attempts):
                with suppress(LayoutError, OSError):
                    read_manifest(folder)
                    return True
    return False


def _last_error(events: list[Event]) -> str:
    end = ended(events)
    text = str(end.get("error") or end.get("cause") or "no end was recorded").strip().splitlines()
    return text[0][:200] if text else "no end was recorded"


def ignored_notices(paths: RunPaths, name: AttemptName, machine: str) -> set[str]:
    """Ids of the notices that ended an earlier attempt on this machine; it was not taken, so they no longer count."""
    found = set()
    for other in list_attempts(paths):
        if other == name:
            continue
        events = read_events(paths, other, ("start", "machines", "end"))
        notice = ended(events).get("notice")
        if machine in machines(events) and isinstance(notice, Mapping):
            found.add(str(notice.get("id")))
    return found
