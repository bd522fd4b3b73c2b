"""The errors in a program's output: Python's tracebacks, and what shells, C++ and launchers print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

Line = tuple[int, str]
"""A line's number in the output, from 0, and its text without the prefix of its rank."""


@dataclass(frozen=True)
class Frame:
    """A place in a traceback."""

    file: str
    line: int
    function: str = ""
    code: str = ""

    @property
    def is_own(self) -> bool:
        """True if the file is the user's own, and neither Python's nor an installed package's nor a launcher's."""
        return not _NOT_OWN.search(self.file)


_NOT_OWN = re.compile(r"/(site|dist)-packages/|/lib(64)?/python3[\d.]*/|^<|/bin/[^/.]+$|/skyspot/trainer/")


@dataclass(frozen=True)
class Error:
    """An error that a program printed."""

    first: int
    """The number of its first line."""
    last: int
    message: str
    """What it says, like `KeyError: 'model'`."""
    at: Frame | None = None
    """The deepest place in the user's own file; without one, the deepest place."""
    before: Error | None = None
    """The exception that led to this one."""
    certain: bool = True
    """False: a line that only reads like an error."""
    rank: int | None = None


def find_errors(lines: Sequence[Line], rank: int | None = None) -> list[Error]:
    """The errors in one rank's lines, in order."""
    found: list[Error] = []
    at = 0
    while at < len(lines):
        read = next((read for reader in _READERS if (read := reader(lines, at))), None)
        if read is None:
            at += 1
            continue
        error, at = read
        if found and any(_CHAINED.match(text) for _, text in _between(lines, found[-1], error)):
            error = replace(error, first=found[-1].first, before=found.pop())
        found.append(replace(error, rank=rank))
    return found


_CHAINED = re.compile(r"(The above exception was the direct cause|During handling of the above exception)|Original ")


def _between(lines: Sequence[Line], one: Error, other: Error) -> Iterator[Line]:
    return (line for line in lines if one.last < line[0] <= other.first)


# -- readers: each returns an error that begins at a line, and the index of the first line after it


_TRACEBACK = re.compile(r"(?:^|.*\s)Traceback \(most recent call last\):$")
_FRAME = re.compile(r'\s+File "(.+?)", line (\d+)(?:,? in (.+))?$')
_MESSAGE = re.compile(r"[A-Za-z_][\w.]*(: .*|:?)$")
_MARKS = re.compile(r"[\s~^]*$")
_SHOWN = 3
"""Lines of a message that are shown."""


def _traceback(lines: Sequence[Line], at: int) -> tuple[Error, int] | None:
    """An exception as Python prints it; `Original Traceback` is that of another process or thread."""
    if not _TRACEBACK.match(lines[at][1]):
        return None
    frames, end = _frames(lines, at + 1)
    if not frames or end >= len(lines) or not _MESSAGE.match(lines[end][1]):
        return None
    message, end = _message(lines, end)
    return Error(lines[at][0], lines[end - 1][0], message, _deepest(frames)), end


def _frames(lines: Sequence[Line], at: int) -> tuple[list[Frame], int]:
    """The frames from a line on, and the index of the first line that belongs to none."""
    frames: list[Frame] = []
    while at < len(lines) and lines[at][1].startswith(" "):
        text = lines[at][1]
        if found := _FRAME.match(text):
            frames.append(Frame(found[1], int(found[2]), found[3] or ""))
        elif frames and not frames[-1].code and not _MARKS.match(text):
            frames[-1] = replace(frames[-1], code=text.strip())
        at += 1
    return frames, at


def _message(lines: Sequence[Line], at: int) -> tuple[str, int]:
    """An exception's message with the indented lines that continue it."""
    end = at + 1
    while end < len(lines) and re.match(r"\s+\S", lines[end][1]) and not _FRAME.match(lines[end][1]):
        end += 1
    shown = [lines[at][1].rstrip(), *(text.strip() for _, text in lines[at + 1 : min(end, at + _SHOWN)])]
    return " ".join(shown), end


def _deepest(frames: Sequence[Frame]) -> Frame | None:
    own = [frame for frame in frames if frame.is_own]
    return own[-1] if own else frames[-1] if frames else None


_BOX = re.compile(r"╭─+ Traceback \(most recent call last\) ─+╮$")
_BOX_FRAME = re.compile(r"│ (\S.*?):(\d+) in (\S+)\s*│$")
_BOX_CODE = re.compile(r"│ ❱ +\d+ │? *(.*?)\s*│$")


def _boxed(lines: Sequence[Line], at: int) -> tuple[Error, int] | None:
    """An exception as rich prints it."""
    if not _BOX.match(lines[at][1]):
        return None
    frames: list[Frame] = []
    at_end = at + 1
    while at_end < len(lines) and lines[at_end][1].startswith("│"):
        text = lines[at_end][1]
        if found := _BOX_FRAME.match(text):
            frames.append(Frame(found[1], int(found[2]), found[3]))
        elif frames and (found := _BOX_CODE.match(text)):
            frames[-1] = replace(frames[-1], code=found[1])
        at_end += 1
    if at_end + 1 >= len(lines) or not frames:
        return None
    message, end = _message(lines, at_end + 1)
    return Error(lines[at][0], lines[end - 1][0], message, _deepest(frames)), end


_SYNTAX = re.compile(r"(SyntaxError|IndentationError|TabError): ")


def _syntax(lines: Sequence[Line], at: int) -> tuple[Error, int] | None:
    """A file that Python cannot read."""
    if not _FRAME.match(lines[at][1]):
        return None
    frames, end = _frames(lines, at)
    if end >= len(lines) or not _SYNTAX.match(lines[end][1]):
        return None
    return Error(lines[at][0], lines[end][0], lines[end][1], frames[-1]), end + 1


_FATAL = re.compile(r"Fatal Python error: .+")


def _fatal(lines: Sequence[Line], at: int) -> tuple[Error, int] | None:
    """The end of an interpreter, with its threads as faulthandler prints them: the innermost frame comes first."""
    if not _FATAL.match(lines[at][1]):
        return None
    end, frames = at + 1, list[Frame]()
    while end < len(lines) and (not lines[end][1] or lines[end][1].startswith(("  File", "Current thread", "Thread "))):
        if (found := _FRAME.match(lines[end][1])) and lines[end][1].startswith("  File"):
            frames.append(Frame(found[1], int(found[2]), found[3] or ""))
        end += 1
    return Error(lines[at][0], lines[end - 1][0], lines[at][1], _deepest(frames[::-1])), end


_TERMINATE = re.compile(r"terminate called (after throwing an instance of '(.+)'|.*)")


def _terminate(lines: Sequence[Line], at: int) -> tuple[Error, int] | None:
    """A C++ exception that nothing caught."""
    found = _TERMINATE.match(lines[at][1])
    if not found:
        return None
    what = re.match(r"\s+what\(\):\s+(.*)", lines[at + 1][1]) if at + 1 < len(lines) else None
    message = f"{found[2]}: {what[1]}" if what and found[2] else lines[at][1]
    end = at + (2 if what else 1)
    while end < len(lines) and re.match(r"Exception raised from |frame #\d+: |$", lines[end][1]):
        end += 1
    return Error(lines[at][0], lines[end - 1][0], message), end


_CERTAIN = [
    re.compile(pattern)
    for pattern in (
        # A shell's job: `run.sh: line 3: 4711 Killed   python train.py`.
        r"(?:.+: line \d+: +|\[\d+\][+-]? +|\s*)(?:\d+ )?"
        r"(?:Killed|Segmentation fault|Bus error|Aborted|Illegal instruction|Floating point exception|Terminated)"
        r"(?: \(core dumped\))?(?:\s|$)",
        r".+: (?:line )?\d+: .+: (?:command )?not found$|\S+: \S+: command not found$",
        r".+: line \d+: .+: (?:No such file or directory|Permission denied|Is a directory|unbound variable)",
        r".+: line \d+: (?:syntax error|unexpected EOF)",
        r"\S*python[\d.]*: (?:can't open file|No module named|Error while finding module|can't find)",
        r"thread '.+' panicked at ",
        r"[\w./ -]+: error: ",
        r"slurmstepd: error: .*(?:oom|OOM|killed)",
        r"(?:Out of memory|OOM|oom-kill): ?[Kk]ill",
    )
]
_UNCERTAIN = re.compile(
    r"(?:.*[\s\[])?(?:ERROR|FATAL|CRITICAL)(?:[\]:\s]|$)|(?:\S+: )?(?:[Ee]rror|[Ff]atal)\b *:"
    r"|[A-Za-z_][\w.]*(?:Error|Exception): |\w+(?:: .+)?: (?:cannot |No such file or directory|Permission denied)"
)


def _line(lines: Sequence[Line], at: int) -> tuple[Error, int] | None:
    """An error that is one line."""
    number, text = lines[at]
    certain = any(pattern.match(text) for pattern in _CERTAIN)
    if not certain and not _UNCERTAIN.match(text):
        return None
    return Error(number, number, text.strip(), certain=certain), at + 1


_Reader = Callable[[Sequence[Line], int], "tuple[Error, int] | None"]
_READERS: tuple[_Reader, ...] = (_traceback, _boxed, _syntax, _fatal, _terminate, _line)
