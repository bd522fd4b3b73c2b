"""A plain SkyPilot YAML, read and edited as text, so that what changes in the file is what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from skyspot import yamltext
from skyspot.errors import UsageError, shown
from skyspot.gpus import Accelerators, parse

_RUNG_KEYS = {"accelerators", "gpus", "use_spot", "infra", "cloud", "region", "zone", "any_of", "ordered"}


def read(path: Path) -> str:
    """The text of a task YAML that is one mapping without a key twice.

    Raises:
        UsageError: it is not; says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8") from None
    try:
        nodes = [node for node in yaml.compose_all(text) if node is not None]
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as YAML: {' '.join(str(error).split())[:200]}") from None
    if len(nodes) != 1 or not isinstance(nodes[0], yaml.MappingNode):
        raise UsageError(f"{path}: one task is needed, a mapping with `run`; there are {len(nodes)} documents in it")
    _refuse_twins(nodes[0], path)
    return text


def _refuse_twins(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise UsageError(
                        f"{path}, line {line}: {shown(key.value)} stands there a second time (line {seen[key.value]})"
                    )
                seen[key.value] = line
            _refuse_twins(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twins(item, path)


def load(text: str) -> dict[str, Any]:
    """The task as a mapping."""
    document = yaml.safe_load(text)
    return document if isinstance(document, dict) else {}


def name(text: str) -> str | None:
    """The task's name."""
    found = load(text).get("name")
    return str(found) if found is not None else None


def accelerators(text: str) -> list[list[Accelerators]]:
    """The accelerators of the task's first rung, as one group; empty where it asks for none."""
    resources = load(text).get("resources") or {}
    rungs = resources.get("ordered") or resources.get("any_of") or [resources]
    asked = rungs[0].get("accelerators") or rungs[0].get("gpus")
    if isinstance(asked, Mapping) and asked:
        asked = ",".join(f"{kind}:{count}" for kind, count in list(asked.items())[:1])
    if isinstance(asked, list) and asked:
        asked = str(asked[0])
    return parse(str(asked)) if asked else []


def _node(text: str) -> yaml.MappingNode:
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode)
    return node


def _entry(node: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((known, value) for known, value in node.value if known.value == key), None)


def _replace(text: str, start: int, end: int, new: str) -> str:
    return text[:start] + new + text[end:]


def with_entry(text: str, key: str, value: str) -> str:
    """The task with a top-level scalar set; `value` is YAML text."""
    found = _entry(_node(text), key)
    if found:
        return _replace(text, found[1].start_mark.index, found[1].end_mark.index, value)
    start = _node(text).start_mark.index
    return _replace(text, start, start, f"{key}: {value}\n")


def with_name(text: str, new: str) -> str:
    """The task under another name."""
    return with_entry(text, "name", yamltext.plain(new))


def with_entries(text: str, key: str, entries: Mapping[str, Any]) -> str:
    """The task with entries set in a top-level mapping (envs, secrets); what else is there stays as it is."""
    for name, value in entries.items():
        text = _with_nested(text, key, name, yamltext.scalar(value))
    return text


def with_resource(text: str, key: str, value: Any) -> str:
    """The task with one of its resources set."""
    return _with_nested(text, "resources", key, yamltext.scalar(value))


def _with_nested(text: str, section: str, key: str, value: str) -> str:
    found = _entry(_node(text), section)
    if not found or (isinstance(found[1], yaml.ScalarNode) and not found[1].value):
        if found:
            start, end = found[0].start_mark.index, found[1].end_mark.index
            return _replace(text, start, end, f"{section}:\n  {key}: {value}\n")
        gap = "" if text.endswith("\n") else "\n"
        return f"{text}{gap}\n{section}:\n  {key}: {value}\n"
    mapping = found[1]
    if not isinstance(mapping, yaml.MappingNode):
        raise UsageError(f"`{section}` is not a mapping: {key} cannot be set in it")
    inner = _entry(mapping, key)
    if inner:
        return _replace(text, inner[1].start_mark.index, inner[1].end_mark.index, value)
    if mapping.flow_style:
        end = mapping.end_mark.index - 1
        comma = ", " if mapping.value else ""
        return _replace(text, end, end, f"{comma}{key}: {value}")
    start = mapping.start_mark.index
    return _replace(text, start, start, f"{key}: {value}\n{' ' * mapping.start_mark.column}")


def with_rungs(text: str, rungs: list[dict[str, Any]]) -> str:
    """The task asking for these rungs, instead of those that it had; its other resources stay."""
    found = _entry(_node(text), "resources")
    kept = {key: value for key, value in (load(text).get("resources") or {}).items() if key not in _RUNG_KEYS}
    asked = {**kept, **rungs[0]} if len(rungs) == 1 else {**kept, "ordered": rungs}
    new = f"resources:\n{yamltext.block(asked, 2)}\n"
    if not found:
        gap = "" if text.endswith("\n") else "\n"
        return f"{text}{gap}\n{new}"
    start, end = found[0].start_mark.index, found[1].end_mark.index
    # A block mapping's end mark lies before the next key: keep the blank lines and comments in front of that.
    taken = text[start:end]
    tail = taken[len(taken.rstrip()) :]
    return _replace(text, start, end, new.rstrip("\n") + (tail or ""))


def with_strategy(text: str, strategy: str) -> str:
    """The task with another recovery strategy; its other settings of job_recovery stay."""
    known = (load(text).get("resources") or {}).get("job_recovery")
    recovery = {**known, "strategy": strategy} if isinstance(known, dict) else {"strategy": strategy}
    return _with_nested(text, "resources", "job_recovery", yamltext.flow(recovery))
