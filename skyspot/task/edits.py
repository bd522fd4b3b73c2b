"""Edits of a plain SkyPilot YAML, made in its text so that nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyspot.errors import UsageError
from skyspot.task import document, emitter, nodes, pipeline, sheet
from skyspot.task.document import Task
from skyspot.task.gpus import Accelerators, parse
from skyspot.task.nodes import MappingNode, compose, entry
from skyspot.task.sheet import Edit, applied

_LINE = re.compile("[^\r\n]*")
_RUNG_KEYS = {"accelerators", "gpus", "use_spot", "infra", "cloud", "region", "zone", "any_of", "ordered"}


def read(path: Path) -> str:
    """Read the text of a task YAML; each document must be a mapping without duplicate keys.

    Raises:
        UsageError: it is not; names the place.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8") from None
    try:
        pipeline.split(text)
    except UsageError as error:
        raise UsageError(f"{path}{', ' if str(error).startswith('line ') else ': '}{error}") from None
    return text


def accelerators(found: Task) -> list[list[Accelerators]]:
    """List the accelerators that a task requests, one group per rung; empty if it requests none.

    Raises:
        UsageError: SkyPilot would refuse `resources`.
    """
    _refuse_odd(found)
    groups = [parse(text)[0] for rung in found.rungs for text, _ in rung.accelerators]
    return [group for number, group in enumerate(groups) if group not in groups[:number]]


def uses_spot(found: Task) -> bool | None:
    """True if a task's first rung requests spot instances; None if it does not say.

    Raises:
        UsageError: SkyPilot would refuse `resources`.
    """
    _refuse_odd(found)
    stated = [known for rung in found.rungs if isinstance(known := rung.values.get("use_spot"), bool)]
    return stated[0] if stated else None


def _refuse_odd(found: Task) -> None:
    if found.rungs_are_odd:
        raise UsageError("`resources` and its rungs must be mappings; SkyPilot would refuse this file")


def _resources(root: MappingNode) -> dict[str, Any]:
    """Read the whole of `resources`, to rewrite it."""
    found = nodes.entries(root).get("resources")
    return found if isinstance(found, dict) else {}


def with_entry(text: str, key: str, value: str) -> str:
    """Set a top-level scalar; `value` is YAML text."""
    root = compose(text)
    found = entry(root, key)
    return applied(text, sheet.put(text, found, value) if found else sheet.insert(root, key, value))


def with_name(text: str, new: str) -> str:
    """Rename the task."""
    return with_entry(text, "name", emitter.plain(new))


def with_entries(text: str, key: str, entries: Mapping[str, Any]) -> str:
    """Set entries in a top-level mapping (envs, secrets); other entries stay unchanged."""
    for name, value in entries.items():
        text = applied(text, sheet.put_in(text, key, name, emitter.scalar(value)))
    return text


def with_resource(text: str, key: str, value: Any) -> str:
    """Set one entry of `resources`."""
    return applied(text, sheet.put_in(text, "resources", key, emitter.scalar(value)))


def without_empty_env(text: str, name: str) -> str:
    """Remove a variable without a value from `envs`, and `envs` itself if it has no other entry."""
    root = compose(text)
    envs = entry(root, "envs")
    found = entry(envs[1], name) if envs else None
    if not envs or not found or nodes.value(found[1]) is not None or not isinstance(envs[1], MappingNode):
        return text
    mapping, key = (envs[1], name) if len(envs[1].value) > 1 else (root, "envs")
    return applied(text, sheet.drop(text, mapping, key))


def with_rungs(text: str, rungs: list[dict[str, Any]]) -> str:
    """Replace the task's rungs; its other resources stay unchanged."""
    root = compose(text)
    found = entry(root, "resources")
    _refuse_odd(document.read(text).tasks[0])
    kept = {key: value for key, value in _resources(root).items() if key not in _RUNG_KEYS}
    resources = {**kept, **rungs[0]} if len(rungs) == 1 else {**kept, "ordered": rungs}
    if root.flow_style:
        new = emitter.flow(resources)
        return applied(text, sheet.put(text, found, new) if found else sheet.insert(root, "resources", new))
    new = f"resources:\n{emitter.block(resources, 2)}"
    if not found:
        end = root.end_mark.index
        return applied(text, Edit(end, end, f"{sheet.gap(text, end)}{new}\n"))
    end = sheet.span(text, found)[1]
    rest = _LINE.match(text, end)
    return applied(text, Edit(found[0].start_mark.index, rest.end() if rest else end, new))


def with_strategy(text: str, strategy: str) -> str:
    """Set the recovery strategy; other settings of job_recovery stay unchanged."""
    known = _resources(compose(text)).get("job_recovery")
    recovery = {**known, "strategy": strategy} if isinstance(known, dict) else {"strategy": strategy}
    return applied(text, sheet.put_in(text, "resources", "job_recovery", emitter.flow(recovery)))
