"""What earlier attempts left: how they ended, on which machines, whether they got anywhere. Standard library only."""

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
"""How long reading what other attempts recorded may take: each tells it in a few objects of its own."""

OWN_DOING_IN_A_ROW = 3

ANY_END_IN_A_ROW = 10


def machines(events: list[Event]) -> set[str]:
    """The tokens of an attempt's machines, as far as they are recorded."""
    found = {str((event_named(events, "start") or {}).get("machine"))}
    listed = (event_named(events, "machines") or {}).get("machines")
    return found | set(map(str, listed if isinstance(listed, list) else []))


def is_finished(
    paths: RunPaths, run_id: str | None, binding: Mapping[str, Any], problem: Callable[[Path, Manifest], str | None]
) -> bool:
    """Whether `final/` is whole, and of the very length that is asked for.

    Args:
        paths: The run's.
        run_id: Which run this is.
        binding: Its `max_steps` and `epochs` say where training ends, as far as they are known.
        problem: Reads and hashes a folder's files.

    Raises:
        AttemptError: it is another run's model, which would be deleted at the end.
        OSError: it cannot be read.
    """
    try:
        manifest = deadlines.read_manifest(paths.final)
    except LayoutVersionError:
        raise
    except LayoutError:
        return False
    if not is_of(manifest, run_id):
        raise AttemptError(
            f"{paths.final} holds the model of another run ({manifest.facts['run_id']}, and this is {run_id}): move "
            "it away, or give this run another name or folder. It is left as it is"
        )
    if manifest.kind != "final" or manifest.facts.get("step") != manifest.facts.get("max_steps"):
        return False
    then = manifest.facts.get("binding")
    if isinstance(then, Mapping) and any(then.get(key) != binding.get(key) for key in ("max_steps", "epochs")):
        return False
    return problem(paths.final, manifest) is None


def ended(events: list[Event]) -> Mapping[str, Any]:
    """The fields of an attempt's end event; empty where it has none."""
    return event_named(events, "end") or {}


def _by_own_doing(events: list[Event], machine: str) -> bool:
    """Whether an attempt ended without anybody's asking: a 75 with no notice before it, or gone without a word here."""
    end = ended(events)
    if not end:
        return machine in machines(events)
    return end.get("code") == EXIT_PREEMPTED and end.get("cause") not in (ending.NOTICE.cause, ending.SIGNAL.cause)


def no_progress(attempt: Attempt, newest_step: int, *, sees_progress: bool = True) -> str | None:
    """Why this launch should stop for good: it starts again and again and gets nowhere. None where it gets somewhere.

    Three attempts in a row that ended by their own doing, or ten however they ended, without a checkpoint above the one
    that the first of them restored and without new data prepared.

    Args:
        attempt: The one that has just begun.
        newest_step: The step that it is about to restore.
        sees_progress: Whether the script keeps its checkpoints where they are seen from here. Where it does not, ten
            preemptions of a run that gets on look like a standstill, and only ends by its own doing count.
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
        said = "; ".join(f"{name}: {_last_error(events)}" for name, events in reversed(row))
        return f"no progress: {count} attempts in a row ended at step {newest_step}. {said}"
    return None


def _restored_step(events: list[Event]) -> int:
    restored, start = event_named(events, "restored"), event_named(events, "start")
    step = restored.get("step") if restored else (start or {}).get("newest_step")
    return step if isinstance(step, int) else 0


def _new_tokens(paths: RunPaths, attempts: Collection[str]) -> bool:
    """Whether one of the attempts left a whole folder of prepared data."""
    with suppress(OSError):
        for folder in paths.tokens.iterdir():
            if any(folder.name.endswith(f"-{name}") for name in attempts):
                with suppress(LayoutError, OSError):
                    read_manifest(folder)
                    return True
    return False


def _last_error(events: list[Event]) -> str:
    end = ended(events)
    text = str(end.get("error") or end.get("cause") or "ended without a word").strip().splitlines()
    return text[0][:200] if text else "ended without a word"


def ignored_notices(paths: RunPaths, name: AttemptName, machine: str) -> set[str]:
    """Ids of the notices that ended an attempt on this very machine: it is still here, so they are over."""
    found = set()
    for other in list_attempts(paths):
        if other == name:
            continue
        events = read_events(paths, other, ("start", "machines", "end"))
        notice = ended(events).get("notice")
        if machine in machines(events) and isinstance(notice, Mapping):
            found.add(str(notice.get("id")))
    return found
