"""The configuration that binds a run: recorded, and compared with what bound it first. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePath
from typing import Any

from trainer.attempt import ending
from trainer.attempt.history import ended
from trainer.attempt.record import Attempt
from trainer.errors import AttemptError
from trainer.layout.events import event_named, read_events
from trainer.layout.manifest import Manifest
from trainer.layout.names import RunPaths, list_attempts


def plain_binding(binding: Mapping[str, Any]) -> dict[str, Any]:
    """What binds a run, as it is recorded: numbers of numpy and torch as numbers, paths as text, tuples as lists.

    Raises:
        AttemptError: a value that cannot be recorded.
    """
    return {str(name): _plain(value, f"binding {name!r}") for name, value in binding.items()}


def _plain(value: Any, where: str) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    raise AttemptError(f"{where}: {value!r:.80} cannot be recorded; use finite numbers, text, lists and dicts")


def binding_problem(
    paths: RunPaths,
    attempt: Attempt,
    binding: Mapping[str, Any],
    allowed: Collection[str],
    newest: Manifest | None,
    is_same: Callable[[str, Mapping[str, Any]], bool] = lambda name, first: False,
) -> str | None:
    """Which field differs from what the run was begun with, and what to do; None where none does.

    Compared with the newest whole checkpoint, or, while there is none, with the first attempt that was not refused.
    A value of another spelling may be the same thing: `is_same` tells, given the field's name and what bound first.
    """
    first = first_binding(paths, attempt, newest)
    if first is None:
        return None
    for name in sorted(binding.keys() & first.keys()):
        if json.dumps(binding[name], default=str) != json.dumps(first[name]) and name not in allowed:
            if is_same(name, first):
                continue
            return (
                f"{paths.root} is a run with {name} {first[name]!r}, and this attempt asks for {binding[name]!r}. "
                f"Give it another name or folder, or change the run with --allow-config-change {name}"
            )
    return None


def first_binding(paths: RunPaths, attempt: Attempt, newest: Manifest | None) -> Mapping[str, Any] | None:
    """What bound the run first: the newest checkpoint's record of it, or the first attempts'; None where there is none.

    Of the attempts, those count that were not refused, up to the first that knew all: the others' values fill in what
    it did not come to know.
    """
    if newest:
        found = newest.facts.get("binding")
        return found if isinstance(found, Mapping) else None
    known: dict[str, Any] = {}
    for name in list_attempts(paths):
        if name == attempt.name:
            continue
        events = read_events(paths, name, ("start", "bound", "end"))
        start, bound = event_named(events, "start"), event_named(events, "bound")
        if start and ended(events).get("cause") != ending.REFUSED.cause:
            known = {**(start.get("binding") or {}), **((bound or {}).get("binding") or {}), **known}
            if bound:
                break
    return known or None
