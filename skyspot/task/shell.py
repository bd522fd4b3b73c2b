"""What a task's `run` or `setup` would start: its commands and their words, read as far as a shell's syntax is plain.

Nothing is run. Quotes, comments, continued lines, here-documents and variables whose value the file itself gives are
understood; what only a running shell knows (`$(...)`, other variables) stays in the words as it is written.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_HERE_DOCUMENT = re.compile(r"(?<!<)<<-?[ \t]*(['\"]?)([A-Za-z_]\w*)\1")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::?-([^$}]*))?\})")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
# Words after which a command begins.
_KEYWORDS = ("{", "!", "if", "then", "else", "elif", "while", "until", "do", "time")
_DECLARE = ("export", "declare", "local", "readonly", "typeset")
_SHELLS = ("bash", "sh", "zsh", "dash")
# Commands that start the command which follows them.
_PREFIXES = ("exec", "env", "nohup", "time", "command", "sudo", "nice")
_LONGEST_VALUE = 4096
_DEEPEST = 4


@dataclass(frozen=True)
class Word:
    """A word of a command, quotes taken off and known variables put in."""

    text: str
    line: int
    """From 0, within the script."""


@dataclass(frozen=True)
class Command:
    """One simple command."""

    words: tuple[Word, ...]
    depth: int = 0
    """0: of the script itself; 1: of a `bash -c '...'` in it; and so on."""
    ends: str = "\n"
    """What ended it: a newline, `;`, `&`, `|` or a bracket, doubled where it stood twice."""

    @property
    def program(self) -> str:
        """The name of the program that it starts, without its folder; of `exec env A=1 x`, `x`."""
        for word in self.words:
            if not _ASSIGNMENT.fullmatch(word.text) and word.text not in _PREFIXES and not word.text.startswith("-"):
                return posixpath.basename(word.text)
        return ""


def commands(script: str, variables: Mapping[str, str] | None = None) -> list[Command]:
    """The commands of a script in their order, with those that it hands to `bash -c` or `eval`.

    Args:
        script: Text for a shell; anything at all may stand in it.
        variables: What the script finds in its environment, where that is known.
    """
    return list(_commands(script, dict(variables or {}), 0))


def runs_our_trainer(run: str, envs: Mapping[str, str] | None = None) -> bool:
    """Whether a script starts `python -m trainer` or `python -m trainer.launch`."""
    return any(starts_our_trainer(command) for command in commands(run, envs))


def starts_our_trainer(command: Command) -> bool:
    """Whether it is `python ... -m trainer` or `-m trainer.launch`; Python's own options may stand before the `-m`."""
    texts = [word.text for word in command.words]
    # Under another launcher (accelerate, torchrun) the trainer's exit codes do not come through.
    if command.program in ("echo", "printf", "accelerate", "torchrun"):
        return False
    return any(
        _module(texts[at + 1 :]) in ("trainer", "trainer.launch")
        for at, text in enumerate(texts)
        if "python" in posixpath.basename(text).lower() and not text.startswith("-")
    )


def _module(arguments: list[str]) -> str | None:
    """The module that Python runs with these arguments; None where it runs no module."""
    rest = iter(arguments)
    for text in rest:
        if re.fullmatch(r"-[A-Za-z]*m", text):
            return next(rest, None)
        if text in ("-X", "-W"):
            next(rest, None)
        elif not text.startswith("-"):
            return None
    return None


def option(command: Command, name: str) -> Word | None:
    """The value of `--name VALUE` or `--name=VALUE`, where it is there."""
    return next(options(command, name), None)


def options(command: Command, name: str) -> Iterator[Word]:
    """The values of `--name VALUE` or `--name=VALUE`, each time that it is there."""
    for word, following in zip(command.words, (*command.words[1:], None), strict=True):
        if word.text == name and following is not None:
            yield following
        elif word.text.startswith(f"{name}="):
            yield Word(word.text[len(name) + 1 :], word.line)


def _commands(script: str, variables: dict[str, str], depth: int) -> Iterator[Command]:
    for command in _Reader(_without_here_documents(script), variables, depth).read():
        yield command
        texts = [word.text for word in command.words]
        inner = None
        if command.program in _SHELLS:
            found = next((i for i, text in enumerate(texts) if re.fullmatch(r"-[a-z]*c", text)), len(texts))
            inner = command.words[found + 1] if found + 1 < len(texts) else None
        elif texts[0] == "eval":
            inner = Word(" ".join(texts[1:]), command.words[0].line)
        if inner and depth < _DEEPEST:
            for nested in _commands(inner.text, dict(variables), depth + 1):
                # A word of an inner script stands where the whole of it begins.
                words = tuple(Word(word.text, inner.line) for word in nested.words)
                yield Command(words, nested.depth, nested.ends)


def _without_here_documents(script: str) -> str:
    """The script with the lines of its here-documents left empty, so that all others keep their numbers."""
    lines = script.split("\n")
    at = 0
    while at < len(lines):
        end = at
        for found in _HERE_DOCUMENT.finditer(lines[at]):
            rest = (i for i in range(end + 1, len(lines)) if lines[i].strip() == found[2])
            end = next(rest, end)
        lines[at + 1 : end + 1] = [""] * (end - at)
        at = end + 1
    return "\n".join(lines)


class _Reader:
    """Goes through a script once, character by character."""

    def __init__(self, text: str, variables: dict[str, str], depth: int) -> None:
        self.text, self.variables, self.depth = text, variables, depth
        self.at = self.line = 0
        self.words: list[Word] = []
        self.word: list[str] | None = None
        self.word_line = 0

    def read(self) -> Iterator[Command]:
        while self.at < len(self.text):
            c = self.text[self.at]
            following = self.text[self.at + 1 : self.at + 2]
            before = self.word[-1][-1:] if self.word else ""
            redirects = c == "&" and (before in ("<", ">") or following == ">")
            if c == "\\":
                self._escaped(following)
            elif c == "'":
                quoted = self._up_to("'")
                self._add(quoted, quoted.strip("'"))
            elif c == '"':
                self._double_quoted()
            elif c == "$" or c == "`":
                self._expansion()
            elif c == "#" and self.word is None:
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif c == "(" and before in ("<", ">", "="):  # Process substitution, or an array's values.
                self._add(self._balanced(self.at))
            elif c in "\n;&|()" and not redirects:
                twice = c in ";&|" and following == c
                self.at += 2 if twice else 1
                yield from self._end(c * 2 if twice else c)
                self.line += c == "\n"
            elif c.isspace():
                self._end_word()
                self.at += 1
            else:
                self._add(c)
        yield from self._end("\n")

    def _add(self, raw: str, text: str | None = None) -> None:
        """Take `raw` from the script, as `text` into the word."""
        if self.word is None:
            self.word, self.word_line = [], self.line
        self.word.append(raw if text is None else text)
        self.at += len(raw)
        self.line += raw.count("\n")

    def _up_to(self, quote: str) -> str:
        end = self.text.find(quote, self.at + 1)
        return self.text[self.at :] if end < 0 else self.text[self.at : end + 1]

    def _escaped(self, following: str) -> None:
        if following == "\n":
            self.at += 2
            self.line += 1
        else:
            self._add(f"\\{following}", following)

    def _double_quoted(self) -> None:
        self._add('"', "")
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == '"':
                self._add(c, "")
                return
            if c == "\\":
                pair = self.text[self.at : self.at + 2]
                self._add(pair, "" if pair == "\\\n" else pair[1:] if pair[1:] in ('"', "\\", "$", "`") else pair)
            elif c in "$`":
                self._expansion()
            else:
                self._add(c)

    def _expansion(self) -> None:
        if self.text[self.at] == "`":
            self._add(self._up_to("`"))
            return
        if self.text.startswith("$(", self.at):
            self._add(self._balanced(self.at + 1))
            return
        found = _VARIABLE.match(self.text, self.at)
        if not found:
            self._add("$")
            return
        value = self.variables.get(found[1] or found[2]) or found[3]
        self._add(found[0], found[0] if value is None else value)

    def _balanced(self, opening: int) -> str:
        """From here to the bracket that closes the one at `opening`."""
        depth = 0
        for end in range(opening, len(self.text)):
            depth += {"(": 1, ")": -1}.get(self.text[end], 0)
            if depth == 0:
                return self.text[self.at : end + 1]
        return self.text[self.at :]

    def _end_word(self) -> None:
        if self.word is not None:
            text = "".join(self.word)
            if self.words or text not in _KEYWORDS:
                self.words.append(Word(text, self.word_line))
            self.word = None

    def _end(self, ends: str) -> Iterator[Command]:
        self._end_word()
        words, self.words = tuple(self.words), []
        if not words:
            return
        yield Command(words, self.depth, ends)
        assigned = words[1:] if words[0].text in _DECLARE else words
        found = [_ASSIGNMENT.fullmatch(word.text) for word in assigned]
        if all(found) or words[0].text in _DECLARE:
            for assignment in found:
                if assignment and len(assignment[2]) <= _LONGEST_VALUE:
                    self.variables[assignment[1]] = assignment[2]
