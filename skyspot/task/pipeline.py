"""A task YAML of several documents: SkyPilot's pipelines (one task after another) and job groups (side by side).

An optional first document holds the job's name and how its tasks run; every other document is a task. A file with one
task is a pipeline of one, so callers need not distinguish them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from skyspot.errors import UsageError, shown
from skyspot.task import document, emitter
from skyspot.task.document import Document
from skyspot.task.nodes import checked, opening, starts
from skyspot.task.sheet import breaks, keeps_lines

_FIRST_BREAK = re.compile("[ \t]*(?:\r\n|[\n\r])?")
_MARK = re.compile(r"^(?:---|\.\.\.)", re.MULTILINE)


@dataclass(frozen=True)
class Pipeline:
    """The documents of a file in order; their joined texts are the file."""

    documents: tuple[str, ...]
    header: int | None
    """Index of the document that names the job and is not a task."""
    tasks: tuple[int, ...]
    """Indexes of the documents that are tasks; the others are empty."""
    above: tuple[str, ...]
    """The line breaks before each document in the original file."""

    @property
    def text(self) -> str:
        """The text of the file."""
        return "".join(self.documents)

    @property
    def several(self) -> bool:
        """True if the file has several tasks or a header."""
        return len(self.tasks) > 1 or self.header is not None

    @property
    def task_texts(self) -> list[str]:
        """The texts of the tasks."""
        return [self.documents[number] for number in self.tasks]

    @property
    def document(self) -> Document:
        """The file as the reader of task YAMLs sees it."""
        return document.read(self.text)

    def named(self, name: str, with_name: Callable[[str, str], str]) -> Pipeline:
        """Rename the job; if it has several tasks, they keep their names."""
        if self.several and self.header is None:
            return self._under(name)
        number = self.header if self.header is not None else self.tasks[0]
        return self.edited(number, lambda text: with_name(text, name))

    def _under(self, name: str) -> Pipeline:
        """Add a header with the job's name."""
        directives, explicit = opening(self.documents[0])
        end = "...\n" if directives else ""  # YAML allows directives only after a document end.
        documents = (f"name: {emitter.plain(name)}\n{end}", *self.documents)
        if not explicit:
            documents = (documents[0], f"---\n{documents[1]}", *documents[2:])
        return Pipeline(documents, 0, tuple(number + 1 for number in self.tasks), ("", *self.above))

    def edited(self, number: int, edit: Callable[[str], str]) -> Pipeline:
        """Edit one document of the file.

        The edit gets the document after as many empty lines as precede it in the file, so that its line numbers are
        those of the file.
        """
        above, document = self.above[number], self.documents[number]
        # Additions go before the blank lines at its end, unless these belong to a value.
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
    """Split a task YAML into documents.

    Raises:
        UsageError: it is not YAML, a document is not a mapping, there is no task, or two tasks have one name.
    """
    begins = starts(text) if _MARK.search(text) else [0]
    documents = tuple(text[start:end] for start, end in zip(begins, [*begins[1:], len(text)], strict=True))
    above = tuple(breaks(text[:start]) for start in begins)
    filled = [number for number, one in enumerate(documents) if len(documents) == 1 or document.read(one).tasks]
    for number in filled:
        Pipeline(documents, None, (), above).edited(number, checked)
    found = document.read(text)
    tasks = tuple(number for number in filled if number or not found.header)
    if not tasks:
        raise UsageError("there is no task (a mapping with `run`)")
    names = [task.name for task in found.tasks if task.name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two tasks are named {shown(twice)}; SkyPilot requires unique names")
    return Pipeline(documents, 0 if found.header else None, tasks, above)
