"""A task YAML of several documents: SkyPilot's pipelines (one task after another) and job groups (side by side).

An optional first document holds the job's name and how its tasks run; every other one is a task. A file of one task is
a pipeline of one, so that nobody has to tell the two apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from skyspot import yamltext
from skyspot.errors import UsageError, shown
from skyspot.known_keys import HEADER
from skyspot.yamledit import UNREADABLE, breaks, compose, keeps_lines, value

_FIRST_BREAK = re.compile("[ \t]*(?:\r\n|[\n\r])?")
_MARK = re.compile(r"^(?:---|\.\.\.)", re.MULTILINE)


@dataclass(frozen=True)
class Pipeline:
    """The documents of a file, in its order: their texts, joined, are the file."""

    documents: tuple[str, ...]
    header: int | None
    """Which document is no task but names the job."""
    tasks: tuple[int, ...]
    """Which documents are tasks; the others are empty."""
    above: tuple[str, ...]
    """The line breaks that stood before each document in the file as it was read."""

    @property
    def text(self) -> str:
        """The file."""
        return "".join(self.documents)

    @property
    def several(self) -> bool:
        """Whether it is more than one task alone."""
        return len(self.tasks) > 1 or self.header is not None

    @property
    def task_texts(self) -> list[str]:
        """The tasks' own texts."""
        return [self.documents[number] for number in self.tasks]

    @property
    def name(self) -> str | None:
        """The job's name: the header's, or the only task's."""
        named = self.header if self.several else self.tasks[0]
        found = _mapping(self.documents[named]).get("name") if named is not None else None
        return None if found is None else str(found)

    @property
    def is_group(self) -> bool:
        """Whether the tasks run side by side."""
        return self.header is not None and _mapping(self.documents[self.header]).get("execution") == "parallel"

    def named(self, name: str, with_name: Callable[[str, str], str]) -> Pipeline:
        """The same under another name; the tasks of several keep theirs."""
        if self.several and self.header is None:
            return self._under(name)
        number = self.header if self.header is not None else self.tasks[0]
        return self.edited(number, lambda text: with_name(text, name))

    def _under(self, name: str) -> Pipeline:
        """The same behind a header of its own."""
        first = next(one for one in yaml.parse(self.documents[0]) if isinstance(one, yaml.DocumentStartEvent))
        end = "...\n" if first.version or first.tags else ""  # Directives come between documents alone.
        documents = (f"name: {yamltext.plain(name)}\n{end}", *self.documents)
        if not first.explicit:
            documents = (documents[0], f"---\n{documents[1]}", *documents[2:])
        return Pipeline(documents, 0, tuple(number + 1 for number in self.tasks), ("", *self.above))

    def edited(self, number: int, edit: Callable[[str], str]) -> Pipeline:
        """The file with one document edited.

        The edit gets the document behind as many empty lines as stand before it in the file: what it says of lines is
        right for the file.
        """
        above, document = self.above[number], self.documents[number]
        # What is added comes before the blank lines at its end, unless these belong to a value.
        body = document if keeps_lines(document) else document.rstrip()
        end = document[len(body) :]
        ending = _FIRST_BREAK.match(end)
        cut = len(body) + (ending.end() if ending else 0)
        edited = edit(above + document[:cut])
        assert edited.startswith(above)
        documents = list(self.documents)
        documents[number] = edited[len(above) :] + document[cut:]
        return replace(self, documents=tuple(documents))


def split(text: str) -> Pipeline:
    """The documents of a task YAML.

    Raises:
        UsageError: it is no YAML, a document is no mapping, none is a task, or two tasks have one name.
    """
    try:
        return _split(text)
    except UNREADABLE as error:
        raise UsageError(f"not readable as YAML: {' '.join(str(error).split())[:200]}") from None


def _split(text: str) -> Pipeline:
    starts = [0]
    if _MARK.search(text):
        begins = [event for event in yaml.parse(text) if isinstance(event, yaml.DocumentStartEvent)]
        starts += [event.start_mark.index for event in begins[1:] if event.start_mark]
    documents = tuple(text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True))
    above = tuple(breaks(text[:start]) for start in starts)
    filled = [number for number, document in enumerate(documents) if len(documents) == 1 or not _is_empty(document)]
    for number in filled:
        Pipeline(documents, None, (), above).edited(number, _checked)
    header = None
    if len(documents) > 1 and filled[:1] == [0]:
        header = 0 if _is_header(_mapping(documents[0])) else None
    tasks = tuple(number for number in filled if number != header)
    if not tasks:
        raise UsageError("there is no task in it, a mapping with `run`")
    names = [str(name) for number in tasks if (name := _mapping(documents[number]).get("name")) is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two tasks are called {shown(twice)}: SkyPilot needs a different name for each")
    return Pipeline(documents, header, tasks, above)


def task_names(pipeline: Pipeline, name: str) -> list[str]:
    """The tasks' names, as SkyPilot gives them where the file does not, in a job of that name."""
    if len(pipeline.tasks) == 1:
        return [name]
    given = [_mapping(text).get("name") for text in pipeline.task_texts]
    return [f"{name}-{number}" if one is None else str(one) for number, one in enumerate(given)]


def tasks_in(text: str) -> list[dict[str, Any]]:
    """The tasks of a text as mappings; whatever it is, without an error."""
    try:
        documents = [one for one in yaml.safe_load_all(text) if one is not None]
    except UNREADABLE:
        return []
    first = documents[0] if len(documents) > 1 else None
    if isinstance(first, dict) and _is_header(first):
        documents = documents[1:]
    return [one if isinstance(one, dict) else {} for one in documents]


def _is_header(first: dict[str, Any]) -> bool:
    """Whether a first document is no task: sky/utils/dag_utils.py."""
    return "name" in first and first.keys() <= {*HEADER}


def _is_empty(document: str) -> bool:
    node = yaml.compose(document)
    return node is None or node.tag == "tag:yaml.org,2002:null"


def _checked(document: str) -> str:
    root = compose(document)
    _refuse_twins(root, set())
    value(root)
    return document


def _refuse_twins(node: yaml.Node, done: set[int]) -> None:
    if id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise UsageError(
                        f"line {line}: {shown(key.value)} stands there a second time (line {seen[key.value]})"
                    )
                seen[key.value] = line
            _refuse_twins(value, done)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twins(item, done)


def _mapping(document: str) -> dict[str, Any]:
    found = yaml.safe_load(document)
    return found if isinstance(found, dict) else {}
