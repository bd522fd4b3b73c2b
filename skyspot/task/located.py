"""A YAML value with its line number, tolerant of any content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from skyspot.task.nodes import MappingNode, Node, ScalarNode, SequenceNode, scalar_value


@dataclass(frozen=True)
class Located:
    """A value in the file, with the line of its key, or for a list item its own line."""

    node: Node
    line: int

    @cached_property
    def entries(self) -> dict[str, Located]:
        """The entries of a mapping, including merged ones; empty for any other value."""
        return dict(_entries(self.node, set()))

    def get(self, *keys: str) -> Located | None:
        """Return the entry of the first of these keys that exists."""
        return next((self.entries[key] for key in keys if key in self.entries), None)

    @property
    def items(self) -> list[Located]:
        """The items of a list; empty for any other value."""
        if not isinstance(self.node, SequenceNode):
            return []
        return [Located(item, item.start_mark.line + 1) for item in self.node.value]

    @property
    def value(self) -> Any:
        """A scalar as YAML 1.1 types it; None if it is null, not a scalar, or does not fit its tag."""
        return scalar_value(self.node)

    @property
    def is_null(self) -> bool:
        """True if the value is empty or null."""
        return self.node.tag == "tag:yaml.org,2002:null"

    @property
    def is_mapping(self) -> bool:
        """True if the value is a mapping."""
        return isinstance(self.node, MappingNode)

    @property
    def is_list(self) -> bool:
        """True if the value is a list."""
        return isinstance(self.node, SequenceNode)

    @property
    def is_verbatim(self) -> bool:
        """True if the value is a literal block (`|`), whose lines are those of the file."""
        return isinstance(self.node, ScalarNode) and self.node.style == "|"

    @property
    def text(self) -> str:
        """A scalar as written; empty for any other value."""
        return self.node.value if isinstance(self.node, ScalarNode) and self.value is not None else ""

    def plain(self, depth: int = 4) -> Any:
        """Convert the value to Python's types; collections below `depth` become None."""
        if depth and self.is_mapping:
            return {key: value.plain(depth - 1) for key, value in self.entries.items()}
        if depth and self.is_list:
            return [item.plain(depth - 1) for item in self.items]
        return self.value


def _entries(node: Node, seen: set[int]) -> Iterator[tuple[str, Located]]:
    """Iterate over keys and values, merged entries before the mapping's own; no node twice."""
    if not isinstance(node, MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
    for value in merged:
        # If several are merged, the first one wins, so it comes last.
        for source in reversed(value.value) if isinstance(value, SequenceNode) else [value]:
            yield from _entries(source, seen)
    for key, value in node.value:
        if isinstance(key, ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            yield key.value, Located(value, key.start_mark.line + 1)
