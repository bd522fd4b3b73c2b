"""A YAML text under edit, at the positions of its nodes: text outside an edit stays unchanged, byte for byte."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from skyspot.errors import UsageError
from skyspot.task.nodes import CollectionNode, Entry, MappingNode, Node, SequenceNode, compose, entry

BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""A line break in YAML."""
_COMMENT = "#[^\n\r\x85\u2028\u2029]*"
_REST = re.compile(f"(?P<gap>[ \t]*)(?P<comment>{_COMMENT})?")
_ALIAS = re.compile(rf"[ \t]*:(?:\s|{_COMMENT})*(\*[^\s,\[\]{{}}]+)")
_BLOCK = re.compile(r"[ \t]*:(?P<gap>\s*)")
_PROPERTIES = re.compile(r"(?:[&!][^\s,\[\]{}]*\s+)*")

_KEEPS = re.compile(r"[|>][0-9]*\+")


class Edit(NamedTuple):
    """A replacement of the characters from `start` to `end` by `new`."""

    start: int
    end: int
    new: str


@dataclass(frozen=True)
class Sheet:
    """A text under edit. It knows the original line of each of its lines, and collects notes on the changes."""

    text: str
    lines: tuple[int, ...]
    notes: tuple[tuple[int, str], ...] = ()
    """Original line and description of each change."""

    @classmethod
    def of(cls, text: str) -> Sheet:
        """Create a sheet without edits."""
        return cls(text, tuple(range(1, len(BREAK.findall(text)) + 2)))

    def line(self, node: Node) -> int:
        """Return the original line of a node of this text."""
        return self.lines[min(node.start_mark.line, len(self.lines) - 1)]

    def noted(self, node: Node, change: str) -> Sheet:
        """Add a note on a node's change."""
        return replace(self, notes=(*self.notes, (self.line(node), change)))

    def edited(self, edit: Edit) -> Sheet:
        """Apply one edit to the sheet."""
        first = len(BREAK.findall(self.text, 0, edit.start))
        last = first + len(BREAK.findall(self.text, edit.start, edit.end))
        whole = not edit.new and edit.start == _line_start(self.text, edit.start)
        lines = (
            *self.lines[:first],
            *[self.lines[first]] * len(BREAK.findall(edit.new)),
            self.lines[last if whole else first],
            *self.lines[last + 1 :],
        )
        return replace(self, text=applied(self.text, edit), lines=lines)


def breaks(text: str) -> str:
    """Return only the line breaks of a text."""
    return "".join(BREAK.findall(text))


def applied(text: str, edit: Edit) -> str:
    """Apply one edit to a text; new line breaks are like those of the text."""
    found = BREAK.search(text)
    new = re.sub("(?<!\r)\n", lambda _: found[0], edit.new) if found else edit.new
    return text[: edit.start] + new + text[edit.end :]


# -- places ------------------------------------------------------------------------------------------------------------


def span(text: str, found: Entry) -> tuple[int, int]:
    """Locate the value of an entry, without comments after it; for an alias, the alias itself."""
    key, node = found
    if node.start_mark.index >= key.end_mark.index:
        return node.start_mark.index, _end(text, node)
    alias = _ALIAS.match(text, key.end_mark.index)
    if not alias:
        raise UsageError(f"line {key.start_mark.line + 1}: write this entry without an alias")
    return alias.span(1)


def _end(text: str, node: Node) -> int:
    """Find the end of a node's last line. A block's end mark is no use: it is before the next key, after comments."""
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        if isinstance(last, tuple):
            return span(text, last)[1]
        if last.start_mark.index < start:
            raise UsageError(f"line {node.start_mark.line + 1}: write the last item of this list without an alias")
        return _end(text, last)
    return start + len(text[start:end].rstrip())


# -- edits -------------------------------------------------------------------------------------------------------------


def append(text: str, found: Entry, new: str) -> Edit | None:
    """Append an item to an entry's block list; None if it is not a plain block list."""
    start, end = span(text, found)
    if not isinstance(found[1], SequenceNode) or not text.startswith("-", start):
        return None
    rest = _REST.match(text, end)
    assert rest
    return Edit(rest.end(), rest.end(), f"\n{' ' * found[1].start_mark.column}- {new}")


def rename(text: str, key: Node, new: str) -> Edit:
    """Rename a key; the new one is quoted if the old one was."""
    start, end = key.start_mark.index, key.end_mark.index
    start += _properties(text, start, end)
    quote = text[start] if text[start] in "'\"" else ""
    return Edit(start, end, f"{quote}{new}{quote}")


def put(text: str, found: Entry, new: str) -> Edit:
    """Replace an entry's value; `new` is one line of YAML. An anchor before the old value stays, a tag does not."""
    start, end = span(text, found)
    if start == end:
        return Edit(start, end, f" {new}")
    colon = _BLOCK.match(text, found[0].end_mark.index)
    if colon and isinstance(found[1], CollectionNode) and not found[1].flow_style and colon.end() == start:
        return Edit(colon.start("gap"), end, f" {new}")
    anchors = [word for word in text[start : start + _properties(text, start, end)].split() if word.startswith("&")]
    return Edit(start, end, " ".join([*anchors, new]))


def _properties(text: str, start: int, end: int) -> int:
    """The number of characters of anchor and tag before a value."""
    found = _PROPERTIES.match(text, start, end)
    return len(found[0]) if found else 0


def insert(mapping: MappingNode, key: str, new: str) -> Edit:
    """A first entry for a mapping; `new` is YAML, of one line where the mapping is in flow style."""
    if not mapping.value:
        return Edit(mapping.end_mark.index - 1, mapping.end_mark.index - 1, f"{key}: {new}")
    first = mapping.value[0][0].start_mark
    gap = ", " if mapping.flow_style else "\n" + " " * first.column
    return Edit(first.index, first.index, f"{key}: {new}{gap}")


def gap(text: str, end: int) -> str:
    """The separator of a new section from the text before it: an empty line, unless that would belong to a value."""
    line = "" if text[:end].endswith(("\n", "\r")) else "\n"
    return line if keeps_lines(text) else f"{line}\n"


def keeps_lines(text: str) -> bool:
    """True if empty lines at the end of a text may belong to a value of it (`|+`)."""
    return _KEEPS.search(text) is not None


def put_in(text: str, section: str, key: str, new: str) -> Edit:
    """An entry of a top-level section, which is made where it is missing.

    Raises:
        UsageError: the section is no mapping.
    """
    root = compose(text)
    found = entry(root, section)
    if not found:
        if root.flow_style:
            return insert(root, section, f"{{{key}: {new}}}")
        end = root.end_mark.index
        return Edit(end, end, f"{gap(text, end)}{section}:\n  {key}: {new}\n")
    node = found[1]
    if node.tag == "tag:yaml.org,2002:null":
        if root.flow_style:
            return put(text, found, f"{{{key}: {new}}}")
        return Edit(*span(text, found), f"\n  {key}: {new}")
    if not isinstance(node, MappingNode):
        raise UsageError(f"`{section}` is not a mapping: {key} cannot be set in it")
    inner = entry(node, key)
    return put(text, inner, new) if inner else insert(node, key, new)


def drop(text: str, mapping: MappingNode, key: str) -> Edit:
    """Remove an entry of a mapping with its line; a comment beside it stays."""
    index = next(index for index, (known, _) in enumerate(mapping.value) if known.value == key)
    start, end = mapping.value[index][0].start_mark.index, span(text, mapping.value[index])[1]
    following = mapping.value[index + 1][0].start_mark.index if index + 1 < len(mapping.value) else None
    if mapping.flow_style:
        return _drop_in_flow(text, mapping, index, start, end, following)
    if len(mapping.value) == 1:
        return Edit(start, end, "{}")
    rest = _REST.match(text, end)
    assert rest
    if rest["comment"]:
        return Edit(start, rest.start("comment"), "")
    beginning = _line_start(text, start)
    if text[beginning:start].strip("\ufeff \t"):  # the first key of a list's item, beside its dash
        joined = following is not None and not text[end:following].strip()
        return Edit(start, following if joined and following is not None else end, "")
    gone = BREAK.match(text, rest.end())
    if gone:
        return Edit(beginning, gone.end(), "")
    return Edit(len(text[:beginning].rstrip("\r\n")), rest.end(), "")


def _drop_in_flow(text: str, mapping: MappingNode, index: int, start: int, end: int, following: int | None) -> Edit:
    if following is not None:
        return Edit(start, following, _comments(text[end:following]))
    if index:
        before = span(text, mapping.value[index - 1])[1]
        return Edit(before, end, _comments(text[before:start]))
    closing = mapping.end_mark.index - 1
    return Edit(start, closing, _comments(text[end:closing]))


def _comments(gap_text: str) -> str:
    """Keep the text between two entries in flow style without its comma; nothing if it has no comment."""
    if "#" not in gap_text:
        return ""
    return "".join(piece for piece in re.findall(rf"{_COMMENT}|,|[^,#]+", gap_text) if piece != ",")


def unwrap(text: str, outer: Entry, inner: Entry) -> Edit:
    """Replace the value of `outer` by the value of its only entry."""
    if not isinstance(outer[1], MappingNode) or outer[1].flow_style:
        start, end = span(text, inner)
        return Edit(*span(text, outer), text[start:end])
    start = inner[0].start_mark.index
    colon = re.compile("[ \t]*:").match(text, inner[0].end_mark.index)
    rest = _REST.match(text, colon.end() if colon else inner[0].end_mark.index)
    assert rest
    gone = BREAK.match(text, rest.end())
    if gone and not rest["comment"]:
        return Edit(_line_start(text, start), gone.end(), "")
    return Edit(start, rest.end("gap"), "")


def _line_start(text: str, index: int) -> int:
    return max(text.rfind(mark, 0, index) for mark in "\n\r\x85\u2028\u2029") + 1


# -- showing -----------------------------------------------------------------------------------------------------------


def difference(before: str, after: str, name: str) -> str:
    """Return the changes of a file as a unified diff for `patch`; empty if there are none."""
    lines = difflib.unified_diff(_lines(before), _lines(after), name, name)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _lines(text: str) -> list[str]:
    return [part for part in re.split("(?<=\n)", text) if part]


def lines_before(before: str, after: str) -> list[int]:
    """For each line of an edited text, return the original line that it comes from, or the nearest one."""
    old, new = BREAK.split(before), BREAK.split(after)
    found: list[int] = []
    for _, first, last, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        found += [min(first + at, max(last - 1, first), len(old) - 1) + 1 for at in range(end - start)]
    return found
