"""Ignored findings: by a comment in the file, or by `--ignore` on the command line.

`# skyspot: ignore[CODE]` (several: `ignore[A, B]`) applies to its own line. On a line of its own it applies to the next
line; if a command continues over several lines, to all of them. An ignored finding stays, as a note.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from skyspot.lint import rules
from skyspot.lint.rules import Finding
from skyspot.task.sheet import BREAK

_MARK = re.compile(r"#\s*skyspot:\s*ignore\b(?:\s*\[([^\]]*)\])?", re.IGNORECASE)
_ALONE = re.compile(r"\s*#")


def overruled(text: str, found: Sequence[Finding], ignored: Collection[str] = ()) -> list[Finding]:
    """Turn ignored findings into notes, and add a warning for each comment without a valid rule.

    Args:
        text: The file's text.
        found: The findings in it.
        ignored: Codes from the command line.
    """
    lines = BREAK.split(text)
    marks = {at: _codes(line) for at, line in enumerate(lines, 1) if _MARK.search(line)}

    def is_overruled(finding: Finding) -> bool:
        return finding.name in ignored or any(finding.name in marks[at] for at in _above(lines, marks, finding.line))

    wrong = [finding for at, codes in marks.items() for finding in _wrong(at, codes)]
    return [
        replace(finding, level="note") if is_overruled(finding) else finding
        for finding in [*found, *dict.fromkeys(wrong)]
    ]


def _codes(line: str) -> tuple[str, ...]:
    """List the codes in a line's comments; a comment without a code gives an empty one."""
    return tuple(code.strip() for mark in _MARK.finditer(line) for code in (mark[1] or "").split(","))


def _wrong(at: int, codes: Sequence[str]) -> list[Finding]:
    found = []
    for code in codes:
        if not code:
            reason, remedy = "this ignore comment names no rule", "Add the code of the finding: ignore[CODE]"
            found.append(Finding(at, "warning", "unknown-ignore", reason, remedy))
        elif code not in rules.CODES:
            reason, remedy = rules.no_such_rule(code), rules.nearest(code)
            found.append(Finding(at, "warning", "unknown-ignore", reason, remedy))
    return found


def _above(lines: Sequence[str], marks: Collection[int], line: int) -> list[int]:
    """List the lines whose comments apply to a line: itself, and comments right above it or above its command."""
    counted = [line] if line in marks else []
    at = line - 1
    while at >= 1 and (_ALONE.match(lines[at - 1]) or lines[at - 1].rstrip().endswith("\\")):
        if at in marks and _ALONE.match(lines[at - 1]):
            counted.append(at)
        at -= 1
    return counted
