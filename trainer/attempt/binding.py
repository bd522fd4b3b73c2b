"""The binding of a run: the configuration that may not change between attempts. Standard library only."""

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
    """The binding as it is recorded: numbers of numpy and torch as plain numbers, paths as text, tuples as lists.

    Raises:
        AttemptError: a value cannot be recorded.
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
    remedy: Callable[[str], str] = lambda name: f"pass --allow-config-change {name}",
) -> str | None:
    """The first field that differs from the run's first binding, with the remedy; None if all agree.

    The run's first binding is that of the newest whole checkpoint. While there is none, it is that of the first attempt
    that was not refused. Two values may name the same thing: `is_same` decides, given the field's name and the first
    binding. `remedy` tells how to allow another value of a field.
    """
    first = first_binding(paths, attempt, newest)
    if first is None:
        return None
    for name in sorted(binding.keys() & first.keys()):
        if json.dumps(binding[name], default=str) != json.dumps(first[name]) and name not in allowed:
            if is_same(name, first):
                continue
            return (
                f"{paths.root}: config mismatch: this run was started with {name}={first[name]!r}, not "
                f"{name}={binding[name]!r}. Use another run name, or {remedy(name)}"
            )
    return None


def first_binding(paths: RunPaths, attempt: Attempt, newest: Manifest | None) -> Mapping[str, Any] | None:
    """The run's first binding: as the newest checkpoint records it, or else the first attempts; None without a record.

    Among the attempts, those count that were not refused, up to the first that recorded its whole binding. If an
    attempt before it recorded a field, the earliest value counts.
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
