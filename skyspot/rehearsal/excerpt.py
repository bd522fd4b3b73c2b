"""Why an attempt failed, from what it printed: the first error that is a cause, and the user's own line.

With several processes, one fails and the others lose their peer; their launcher then prints a summary. Neither is a
cause. An error after which the program went on was handled, so only the errors of the output's end count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from skyspot.rehearsal.tracebacks import Error, Frame, Line, find_errors

LAST_LINES = 12
_WENT_ON = 40
"""Ordinary lines after an error that show that the program went on."""


@dataclass(frozen=True)
class Excerpt:
    """What to show of a failed attempt's output."""

    lines: tuple[str, ...]
    is_cause: bool
    """True if they name an error; False if they are just the last lines."""


def read_excerpt(output: str, machine: str) -> Excerpt:
    """The error that made an attempt fail, else the last lines of its output.

    Args:
        output: What the attempt printed.
        machine: The machine's folder: its HOME is shown as `~`, the script as `run`.
    """
    lines = [_COLOURS.sub("", line)[:_LONGEST] for line in re.split(r"\r\n|\n|\r", output)]
    cause = _cause(lines)
    if cause is None:
        return Excerpt(tuple([line for line in lines if line.strip()][-LAST_LINES:]), False)
    shown = []
    for line in _shown(cause):
        for folder, name in (
            (f"{machine}/home/sky_workdir/", ""),
            (f"{machine}/home", "~"),
            (f"{machine}/run.sh", "run"),
        ):
            line = line.replace(folder, name)
        shown.append(line if len(line) <= _WIDEST else f"{line[:_WIDEST]}...")
    return Excerpt(tuple(shown), True)


_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LONGEST = 4000
_WIDEST = 400
_NO_GPU = re.compile(r"package doesn't have NCCL built in|ProcessGroupNCCL is only supported with GPUs")


def _shown(error: Error) -> Iterator[str]:
    """An error with the exception that led to it and the user's own line of each."""
    first = error
    while first.before:
        first = first.before
    parts = [first, error] if first.message != error.message else [first]
    has_own = any(part.at and part.at.is_own for part in parts)
    for part in dict.fromkeys(parts):
        who = f"rank {error.rank}: " if error.rank is not None and part is first else ""
        yield f"{who}{'then ' if part is not first else ''}{part.message}"
        if part.at and (part.at.is_own or not has_own):
            yield f"  {_place(part.at)}"
    if _NO_GPU.search(error.message):
        yield '  NCCL needs a GPU: init_process_group("nccl" if torch.cuda.is_available() else "gloo") needs none'


def _place(frame: Frame) -> str:
    function = f", in {frame.function}" if frame.function and frame.function != "<module>" else ""
    return f"{frame.file}, line {frame.line}{function}{': ' if frame.code else ''}{frame.code}"


def _cause(lines: list[str]) -> Error | None:
    """The error that is the cause, if one can be told."""
    streams: dict[int | None, list[Line]] = {}
    table = _table(lines)
    for number, line in enumerate(lines):
        if not table or not table.holds(number):
            rank, text = _rank_and_text(line)
            streams.setdefault(rank, []).append((number, text))
    errors = sorted((error for rank, stream in streams.items() for error in find_errors(stream, rank)),
                    key=lambda error: error.first)  # fmt: skip
    errors = [error for error in errors if not _LAUNCHERS.match(error.message) and not _NOISE.match(error.message)]
    causes = [error for error in errors if not _CONSEQUENCE.search(error.message)]
    if table:
        named = [error for error in errors if error.rank == table.rank]
        if named:
            return _first(lines, [error for error in named if error in causes] or named)
        if table.killed:
            return Error(table.first, table.last, table.killed, rank=table.rank)
    chosen = _first(lines, causes or errors)
    return None if chosen is None or _ordinary(lines, errors, chosen.last + 1, len(lines)) > _WENT_ON else chosen


def _first(lines: list[str], errors: list[Error]) -> Error | None:
    """The first of the last errors between which nothing else was printed; one that is certain if there is one."""
    last: list[Error] = []
    for error in errors:
        if last and _ordinary(lines, errors, last[-1].last + 1, error.first):
            last = []
        last.append(error)
    return next((error for error in last if error.certain), last[0] if last else None)


def _ordinary(lines: list[str], errors: list[Error], start: int, end: int) -> int:
    """Count the lines of a range that are neither part of an error nor a launcher's or a warning."""
    inside = {number for error in errors for number in range(error.first, error.last + 1)}
    return sum(
        bool(text.strip()) and not _NOISE.match(text)
        for number in range(start, end)
        if number not in inside
        for text in [_rank_and_text(lines[number])[1]]
    )


_PREFIX = re.compile(r"(?:\[rank(\d+)\]:|\[default(\d+)\]:|\[\d+,(\d+)\]<std(?:err|out)>:|rank (\d+):) ?")


def _rank_and_text(line: str) -> tuple[int | None, str]:
    """A line's rank, where a launcher or torch names it, and the rest of the line."""
    rank = None
    while found := _PREFIX.match(line):
        rank = int(next(group for group in found.groups() if group is not None))
        line = line[found.end() :]
    return rank, _GROUP.sub("", line)


_GROUP = re.compile(r"^\s+(?:[+|] |\+-.*)")
"""What Python draws beside the exceptions of a group."""
_LAUNCHERS = re.compile(r"(?:[\w.]+\.)?(?:ChildFailedError|SignalException|ProcessRaisedException)\b")
_CONSEQUENCE = re.compile(
    r"Connection (?:closed|reset) by peer|Broken ?[Pp]ipe|ConnectionResetError|ConnectionRefusedError"
    r"|CalledProcessError|KeyboardInterrupt|SIGTERM|Terminated|ncclRemoteError|NCCL communicator was aborted"
    r"|collective operation timeout|DataLoader worker \(pid|DistStoreError|DistNetworkError|Socket Timeout"
)
_NOISE = re.compile(
    r"\[?[WEIF]\d{4} \d\d:\d\d|\[[-\d]+ [:,\d]+\] torch\.distributed\.|Sending process \d+ closing signal"
    r"|\S+:\d+: \w*Warning: |\s+warnings\.warn\(|(?:.*[\s\[])?WARNING(?:[\]:\s]|$)|Exception ignored "
    r"|wandb: |srun: |mpirun |prterun |Primary job +terminated|a non-zero exit code\. Per user|[-=*]{5,}$"
)


@dataclass(frozen=True)
class _Table:
    """The summary that a launcher prints."""

    first: int
    last: int
    rank: int
    killed: str
    """The signal that killed the rank, as an error; empty if it exited by itself."""

    def holds(self, number: int) -> bool:
        return self.first <= number <= self.last


_ROOT = re.compile(r"Root Cause \(first observed failure\)")
_MPI = re.compile(r"(?:mpirun|prterun) noticed that process rank (\d+) .*exited on signal (\d+)(?: \((.+)\))?")


def _table(lines: list[str]) -> _Table | None:
    """The last summary of torchrun or mpirun."""
    for number in range(len(lines) - 1, -1, -1):
        if found := _MPI.match(lines[number]):
            return _Table(number, number, int(found[1]), f"killed by signal {found[2]} ({found[3] or '-'})")
        if not _ROOT.match(lines[number]):
            continue
        end = next((at for at in range(number + 1, len(lines)) if lines[at].startswith("=====")), len(lines) - 1)
        entry = "\n".join(lines[number:end])
        rank = re.search(r"^\s+rank\s+: (\d+)", entry, re.M)
        signal = re.search(r"^\s+exitcode\s+: -\d+ .*\((SIG\w+)\)", entry, re.M)
        if rank is None:
            continue
        start = next((at for at in range(number, 0, -1) if lines[at].startswith("=====")), number)
        return _Table(start, end, int(rank[1]), f"killed by {signal[1]}" if signal else "")
    return None
