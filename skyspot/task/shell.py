"""The shell commands of a task's `run` or `setup`, read as far as the syntax is plain.

Nothing is run. The reader understands quotes, comments, continued lines, here-documents, and variables that the file
itself sets. Parts that only a running shell knows (`$(...)`, other variables) stay in the words as written.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_HERE_DOCUMENT = re.compile(r"(?<!<)<<-?[ \t]*(['\"]?)([A-Za-z_]\w*)\1")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::?-([^$}]*))?\})")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
# Keywords that precede a command.
_KEYWORDS = ("{", "!", "if", "then", "else", "elif", "while", "until", "do", "time")
_DECLARE = ("export", "declare", "local", "readonly", "typeset")
_SHELLS = ("bash", "sh", "zsh", "dash")
# Commands that run the command after them: their options that take a value, and how many other arguments come first.
_CONDA_RUN = ("-n --name -p --prefix --cwd", 0)
_WRAPPERS = {
    "command": ("", 0),
    "conda run": _CONDA_RUN,
    "env": ("-u --unset -C --chdir", 0),
    "exec": ("-a", 0),
    "ionice": ("-c --class -n --classdata", 0),
    "mamba run": _CONDA_RUN,
    "micromamba run": _CONDA_RUN,
    "nice": ("-n --adjustment", 0),
    "nohup": ("", 0),
    "numactl": ("-N --cpunodebind -m --membind -C --physcpubind -i --interleave -p --preferred", 0),
    "pdm run": ("-p --project", 0),
    "pipenv run": ("", 0),
    "poetry run": ("-C --directory -P --project", 0),
    "screen": ("-S -c -e -h -p -t -T", 0),
    "setsid": ("", 0),
    "stdbuf": ("-i --input -o --output -e --error", 0),
    "sudo": ("-u --user -g --group -h --host -p --prompt -C -D --chdir", 0),
    "taskset": ("", 1),
    "time": ("-f --format -o --output", 0),
    "timeout": ("-s --signal -k --kill-after", 1),
}
_LONGEST_VALUE = 4096
_DEEPEST = 4


@dataclass(frozen=True)
class Word:
    """A word of a command, without quotes and with known variables filled in."""

    text: str
    line: int
    """Line within the script, from 0."""


@dataclass(frozen=True)
class Command:
    """One simple command."""

    words: tuple[Word, ...]
    depth: int = 0
    """0: in the script itself; 1: in a `bash -c '...'` of the script; and so on."""
    ends: str = "\n"
    """The token after it: a newline, `;`, `&`, `|`, `;;`, `&&`, `||` or a bracket."""

    @property
    def inner(self) -> tuple[Word, ...]:
        """The words without assignments and wrappers: `x -a` for `exec env A=1 timeout 3h x -a`."""
        words = self.words
        while words:
            name, following = posixpath.basename(words[0].text), words[1].text if len(words) > 1 else ""
            if name in _WRAPPERS:
                words = _after_options(words[1:], *_WRAPPERS[name])
            elif f"{name} {following}" in _WRAPPERS:
                words = _after_options(words[2:], *_WRAPPERS[f"{name} {following}"])
            elif _ASSIGNMENT.fullmatch(words[0].text) or words[0].text.startswith("-"):
                words = words[1:]
            else:
                break
        return words

    @property
    def program(self) -> str:
        """The name of the program, without its folder; `x` for `exec env A=1 x`."""
        words = self.inner
        return posixpath.basename(words[0].text) if words else ""


def _after_options(words: tuple[Word, ...], with_value: str, arguments: int) -> tuple[Word, ...]:
    """Skip a wrapper's options, with their values, and its arguments. A value may be part of the option's word."""
    valued = with_value.split()
    at = 0
    while at < len(words) and words[at].text.startswith("-"):
        text = words[at].text
        last = text if text.startswith("--") else f"-{text[-1]}"  # `-dmS NAME` is `-d -m -S NAME`.
        at += 2 if last in valued else 1
    return words[at + arguments :]


def commands(script: str, variables: Mapping[str, str] | None = None) -> list[Command]:
    """List the commands of a script in order, including those that it passes to `bash -c` or `eval`.

    Args:
        script: Text for a shell; it may be invalid.
        variables: The script's environment, as far as it is known.
    """
    return list(_commands(script, dict(variables or {}), 0))


def starts_our_trainer(command: Command) -> bool:
    """True if a command is `python ... -m trainer` or `-m trainer.launch`; Python's options may precede `-m`."""
    texts = [word.text for word in command.words]
    # Another launcher (accelerate, torchrun) hides the trainer's exit codes.
    if command.program in ("echo", "printf", "accelerate", "torchrun"):
        return False
    return any(
        _module(texts[at + 1 :]) in ("trainer", "trainer.launch")
        for at, text in enumerate(texts)
        if "python" in posixpath.basename(text).lower() and not text.startswith("-")
    )


def _module(arguments: list[str]) -> str | None:
    """Find the module that Python runs with these arguments; None if it runs none."""
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
    """Find the value of `--name VALUE` or `--name=VALUE`; None if it is not given."""
    return next(options(command, name), None)


def options(command: Command, name: str) -> Iterator[Word]:
    """Iterate over all values of `--name VALUE` or `--name=VALUE`."""
    for word, following in zip(command.words, (*command.words[1:], None), strict=True):
        if word.text == name and following is not None:
            yield following
        elif word.text.startswith(f"{name}="):
            yield Word(word.text[len(name) + 1 :], word.line)


def _commands(script: str, variables: dict[str, str], depth: int) -> Iterator[Command]:
    for command in _Reader(_without_here_documents(script), variables, depth).read():
        yield command
        words = command.inner
        inner = None
        if command.program in _SHELLS:
            found = next((i for i, word in enumerate(words) if re.fullmatch(r"-[a-z]*c", word.text)), len(words))
            inner = words[found + 1] if found + 1 < len(words) else None
        elif command.program == "eval":
            inner = Word(" ".join(word.text for word in words[1:]), words[0].line)
        if inner and depth < _DEEPEST:
            for nested in _commands(inner.text, dict(variables), depth + 1):
                # Words of an inner script get the line where that script begins.
                words = tuple(Word(word.text, inner.line) for word in nested.words)
                yield Command(words, nested.depth, nested.ends)


def _without_here_documents(script: str) -> str:
    """Empty the lines of here-documents, so that the other lines keep their numbers."""
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
    """Reads a script once, character by character."""

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
        """Consume `raw` from the script, and add `text` (by default `raw`) to the word."""
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
        """Return the text from here to the bracket that closes the one at `opening`."""
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
