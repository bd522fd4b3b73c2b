"""The result of a rehearsal as Markdown, for the summary of a job."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from skyspot.rehearsal import attempts
from skyspot.rehearsal.junit import printable
from skyspot.rehearsal.result import Leg, Result, heading

_MARKS = re.compile(r"[\\`*_\[\]<>&|~#$@!]")


def summary(name: str, result: Result) -> str:
    """Write the verdict, the table by kind of preemption, each failure and the notes.

    Args:
        name: The task's name.
        result: The result.
    """
    found = [f"### skyspot rehearse {plain(name)}: {_overall(result)}"]
    if result.kinds:
        found.append(_table(result))
    printed = set[str]()
    for leg in result.legs:
        if not leg.verdict or leg.verdict.text in printed:
            continue  # Legs that go on with what another left say the same.
        printed.add(leg.verdict.text)
        found.append(_verdict(leg))
    for leg in result.legs:
        if leg.preempted:
            found.append(_attempts(leg))
    notes = [note for leg in result.legs if leg.verdict for note in leg.verdict.notes] + result.notes
    if notes:
        found.append("\n".join(f"- {plain(note)}" for note in dict.fromkeys(notes)))
    return "\n\n".join(found) + "\n"


def plain(text: str) -> str:
    """Escape text for one line of Markdown, so that it is shown as it is."""
    return _MARKS.sub(r"\\\g<0>", " ".join(printable(text).split()))


def fenced(text: str) -> str:
    """Put text into a code block whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{printable(text)}\n{fence}"


def _overall(result: Result) -> str:
    if result.exact:
        return "exact"
    wrong = any(leg.verdict and leg.verdict.checked and not leg.verdict.exact for leg in result.legs)
    return "**NOT exact**" if wrong else "**not checked**"


def _table(result: Result) -> str:
    lines = ["| kind | verdict | what was struck |", "| --- | --- | --- |"]
    lines += [f"| {plain(kind.kind)} | {plain(kind.outcome)} | {plain(kind.why)} |" for kind in result.kinds]
    return "\n".join(lines)


def _attempts(leg: Leg) -> str:
    """A table of a leg's attempts, folded away."""
    columns, rows = attempts.table(leg.rows)
    title = html.escape(printable(heading(leg.title, leg.planned)))
    lines = [f"<details><summary>{title}</summary>\n", _line(columns), _line(["---"] * len(columns))]
    lines += [_line(map(plain, row)) for row in rows]
    again = attempts.done_again(leg.rows)
    return "\n".join([*lines, *([f"\n{plain(again)}"] if again else []), "\n</details>"])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |"


def _verdict(leg: Leg) -> str:
    assert leg.verdict
    first, _, excerpt = leg.verdict.text.partition("\n")
    parts = [f"**{plain(leg.title)}:** {plain(first)}", fenced(excerpt) if excerpt.strip() else ""]
    if leg.verdict.remedy:
        parts.append(f"**Remedy:** {plain(leg.verdict.remedy)}")
    return "\n\n".join(filter(None, parts))
