"""YAML nodes with their positions in the text, read strictly and looked up by key."""

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

# Errors from reading YAML. PyYAML lets Python's own errors through, for `!!bool x` or an invalid date.
UNREADABLE = (yaml.YAMLError, RecursionError, ValueError, OverflowError, TypeError, AttributeError, LookupError)
Entry = tuple[Node, Node]
"""A key and its value."""


def not_yaml(error: BaseException, text: str) -> NotYamlError:
    """Convert one of UNREADABLE into the error to raise."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or (
        "nested too deeply" if isinstance(error, RecursionError) else str(error)
    )
    line = min(mark.line + 1, len(text.splitlines()) or 1) if mark else 1
    return NotYamlError(f"not readable as YAML: {' '.join(str(error).split())[:200]}", line, str(problem))


def starts(text: str) -> list[int]:
    """List where the documents of a text start; the first one starts with the text.

    Raises:
        UsageError: the text is not YAML.
    """
    try:
        begins = [event for event in yaml.parse(text) if isinstance(event, yaml.DocumentStartEvent)]
    except UNREADABLE as error:
        raise not_yaml(error, text) from None
    return [0, *(event.start_mark.index for event in begins[1:] if event.start_mark)]


def opening(text: str) -> tuple[bool, bool]:
    """(True if a text starts with directives, True if it starts with `---`)."""
    first = next(event for event in yaml.parse(text) if isinstance(event, yaml.DocumentStartEvent))
    return bool(first.version or first.tags), bool(first.explicit)


def checked(text: str) -> str:
    """Return the text if it is one mapping without duplicate keys.

    Raises:
        UsageError: it is not; names the line.
    """
    root = compose(text)
    refuse_twins(root)
    value(root)
    return text


def refuse_twins(node: Node, done: set[int] | None = None) -> None:
    """Refuse duplicate keys in a mapping: YAML's loader silently takes the last.

    Raises:
        UsageError: there is one; names the line.
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
                    raise UsageError(f"line {line}: duplicate key {shown(key.value)} (first on line {seen[key.value]})")
                seen[key.value] = line
            refuse_twins(value, done)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            refuse_twins(item, done)


def compose(text: str) -> MappingNode:
    """Parse a text that is one mapping into nodes.

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
    found = "the file is empty" if not nodes else f"the file has {len(nodes)} documents"
    if len(nodes) == 1:
        found = "this is a list" if isinstance(nodes[0], SequenceNode) else "this is a single value"
    raise UsageError(f"expected one task, a mapping with `run`; {found}")


def _refuse_circles(node: Node, above: frozenset[int], done: set[int]) -> None:
    if id(node) in above:
        raise UsageError(f"line {node.start_mark.line + 1}: this anchor contains an alias of itself")
    if id(node) in done or not isinstance(node, CollectionNode):
        return
    for item in node.value:
        for child in item if isinstance(item, tuple) else (item,):
            _refuse_circles(child, above | {id(node)}, done)
    done.add(id(node))


def value(node: Node) -> Any:
    """Convert a node to Python's types, with merge keys merged.

    Raises:
        UsageError: Python cannot represent it, for example an invalid date.
    """
    try:
        # Construct from a copy, because constructing adds the entries merged by `<<` to the node.
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
    """Convert a mapping node to a dict; empty for any other node."""
    found = value(node)
    return found if isinstance(found, dict) else {}


def entry(mapping: Node | None, key: str) -> Entry | None:
    """Find an entry in the mapping itself, not in the mappings that `<<` merges into it."""
    if not isinstance(mapping, MappingNode):
        return None
    return next(((known, found) for known, found in mapping.value if known.value == key), None)


def merged(node: Node) -> Iterator[MappingNode]:
    """Iterate over a mapping and the mappings that `<<` merges into it."""
    if isinstance(node, MappingNode):
        yield node
        found = entry(node, "<<")
        if found:
            for source in found[1].value if isinstance(found[1], SequenceNode) else [found[1]]:
                yield from merged(source)


def at(node: Node, *path: str) -> Iterator[tuple[MappingNode, Entry]]:
    """Iterate over the entries at a path, with their mappings; `*` matches every key and every list item."""
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
