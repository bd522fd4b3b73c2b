"""A YAML value with the line that it stands in, whatever strange thing stands in its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from skyspot.task.nodes import MappingNode, Node, ScalarNode, SequenceNode, scalar_value


@dataclass(frozen=True)
class Located:
    """A value in the file, and the line of its key; of an item of a list, its own line."""

    node: Node
    line: int

    @cached_property
    def entries(self) -> dict[str, Located]:
        """The entries of a mapping, merge keys followed; empty where it is none."""
        return dict(_entries(self.node, set()))

    def get(self, *keys: str) -> Located | None:
        """The entry of the first of these keys that is there."""
        return next((self.entries[key] for key in keys if key in self.entries), None)

    @property
    def items(self) -> list[Located]:
        """The items of a list; empty where it is none."""
        if not isinstance(self.node, SequenceNode):
            return []
        return [Located(item, item.start_mark.line + 1) for item in self.node.value]

    @property
    def value(self) -> Any:
        """A scalar as YAML 1.1 types it; None where it is null, not a scalar, or not what its tag says."""
        return scalar_value(self.node)

    @property
    def is_null(self) -> bool:
        """Whether there is nothing, or a null."""
        return self.node.tag == "tag:yaml.org,2002:null"

    @property
    def is_mapping(self) -> bool:
        """Whether it is a mapping."""
        return isinstance(self.node, MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.node, SequenceNode)

    @property
    def is_verbatim(self) -> bool:
        """Whether it is a text whose lines are the file's own (`|`)."""
        return isinstance(self.node, ScalarNode) and self.node.style == "|"

    @property
    def text(self) -> str:
        """A scalar as it is written; empty where it is none."""
        return self.node.value if isinstance(self.node, ScalarNode) and self.value is not None else ""

    def plain(self, depth: int = 4) -> Any:
        """The value in Python's types; what lies deeper than `depth` is left out."""
        if depth and self.is_mapping:
            return {key: value.plain(depth - 1) for key, value in self.entries.items()}
        if depth and self.is_list:
            return [item.plain(depth - 1) for item in self.items]
        return self.value


def _entries(node: Node, seen: set[int]) -> Iterator[tuple[str, Located]]:
    """Key and value, what is merged in before what stands in the mapping itself; no node twice."""
    if not isinstance(node, MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
    for value in merged:
        # Of several, the first has the last word.
        for source in reversed(value.value) if isinstance(value, SequenceNode) else [value]:
            yield from _entries(source, seen)
    for key, value in node.value:
        if isinstance(key, ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            yield key.value, Located(value, key.start_mark.line + 1)
