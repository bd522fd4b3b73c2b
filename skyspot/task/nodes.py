"""YAML as nodes with their marks, for edits of the text: read strictly, and walked by key."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import yaml
from yaml import CollectionNode as CollectionNode  # Exported: only this module and the readers import yaml.
from yaml import MappingNode as MappingNode
from yaml import Node as Node
from yaml import ScalarNode as ScalarNode
from yaml import SequenceNode as SequenceNode

from skyspot.errors import NotYamlError, UsageError, shown

# What reading YAML can raise: PyYAML lets Python's own errors through, of `!!bool x` or a date that is none.
UNREADABLE = (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError, AttributeError, LookupError)
Entry = tuple[Node, Node]
"""A key and its value."""


def not_yaml(error: BaseException, text: str) -> NotYamlError:
    """What to raise where reading a text raised one of UNREADABLE."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or (
        "nested too deeply" if isinstance(error, RecursionError) else str(error)
    )
    line = min(mark.line + 1, len(text.splitlines()) or 1) if mark else 1
    return NotYamlError(f"not readable as YAML: {' '.join(str(error).split())[:200]}", line, str(problem))


def starts(text: str) -> list[int]:
    """Where the documents of a text start; the first one with the text itself.

    Raises:
        UsageError: it is not YAML.
    """
    try:
        begins = [event for event in yaml.parse(text) if isinstance(event, yaml.DocumentStartEvent)]
    except UNREADABLE as error:
        raise not_yaml(error, text) from None
    return [0, *(event.start_mark.index for event in begins[1:] if event.start_mark)]


def opening(text: str) -> tuple[bool, bool]:
    """Whether a text opens with directives, and whether with `---`."""
    first = next(event for event in yaml.parse(text) if isinstance(event, yaml.DocumentStartEvent))
    return bool(first.version or first.tags), bool(first.explicit)


def checked(text: str) -> str:
    """The text, which is one mapping without a key twice.

    Raises:
        UsageError: it is not; says where.
    """
    root = compose(text)
    refuse_twins(root)
    value(root)
    return text


def refuse_twins(node: Node, done: set[int] | None = None) -> None:
    """Refuse a key that stands twice in a mapping: YAML's loader silently takes the last.

    Raises:
        UsageError: there is one; says where.
    """
    done = set() if done is None else done
    if id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise UsageError(
                        f"line {line}: {shown(key.value)} stands there a second time (line {seen[key.value]})"
                    )
                seen[key.value] = line
            refuse_twins(value, done)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            refuse_twins(item, done)


def compose(text: str) -> MappingNode:
    """The nodes of a text that is one mapping.

    Raises:
        UsageError: it is not, or an alias in it contains itself.
    """
    try:
        nodes = [node for node in yaml.compose_all(text) if node is not None]
        if len(nodes) == 1 and isinstance(nodes[0], MappingNode):
            _refuse_circles(nodes[0], frozenset(), set())
            return nodes[0]
    except UNREADABLE as error:
        raise not_yaml(error, text) from None
    found = "the file is empty" if not nodes else f"there are {len(nodes)} documents in it"
    if len(nodes) == 1:
        found = "this is a list" if isinstance(nodes[0], SequenceNode) else "this is a single value"
    raise UsageError(f"one task is needed, a mapping with `run`; {found}")


def _refuse_circles(node: Node, above: frozenset[int], done: set[int]) -> None:
    if id(node) in above:
        raise UsageError(f"line {node.start_mark.line + 1}: the anchor there holds an alias of itself")
    if id(node) in done or not isinstance(node, CollectionNode):
        return
    for item in node.value:
        for child in item if isinstance(item, tuple) else (item,):
            _refuse_circles(child, above | {id(node)}, done)
    done.add(id(node))


def value(node: Node) -> Any:
    """What a node means, merge keys merged.

    Raises:
        UsageError: nothing that Python can hold, like a date that is none.
    """
    try:
        # A copy: constructing puts the entries that `<<` merges among the node's own.
        return yaml.constructor.SafeConstructor().construct_document(copy.deepcopy(node))
    except UNREADABLE as error:
        problem = " ".join(str(error).split())[:200]
        raise UsageError(f"line {node.start_mark.line + 1}: not readable as YAML: {problem}") from None


def scalar_value(node: Node) -> Any:
    """A scalar as YAML 1.1 types it; None where it is null, not a scalar, or does not fit its tag."""
    if not isinstance(node, ScalarNode):
        return None
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except UNREADABLE:
        return None


def entries(node: Node) -> dict[str, Any]:
    """What a mapping's node means, by its keys; nothing of another node's."""
    found = value(node)
    return found if isinstance(found, dict) else {}


def entry(mapping: Node | None, key: str) -> Entry | None:
    """An entry of a mapping that stands in itself, not in what `<<` merges into it."""
    if not isinstance(mapping, MappingNode):
        return None
    return next(((known, found) for known, found in mapping.value if known.value == key), None)


def merged(node: Node) -> Iterator[MappingNode]:
    """A mapping, and those that `<<` merges into it."""
    if isinstance(node, MappingNode):
        yield node
        found = entry(node, "<<")
        if found:
            for source in found[1].value if isinstance(found[1], SequenceNode) else [found[1]]:
                yield from merged(source)


def at(node: Node, *path: str) -> Iterator[tuple[MappingNode, Entry]]:
    """The entries at a path, each with its mapping; `*` is every key of a mapping, and every item of a list."""
    if isinstance(node, SequenceNode) and path[0] == "*":
        for item in node.value:
            yield from at(item, *path[1:])
    for mapping in merged(node):
        for key, found in mapping.value:
            if key.value == path[0] or (path[0] == "*" and key.value != "<<"):
                if len(path) == 1:
                    yield mapping, (key, found)
                else:
                    yield from at(found, *path[1:])
