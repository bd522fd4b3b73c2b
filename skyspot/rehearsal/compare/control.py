"""Comparing two runs, and the control: a comparison proves nothing if two undisturbed runs differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from skyspot.rehearsal import verdict
from skyspot.rehearsal.compare.difference import Sides
from skyspot.rehearsal.compare.files import Buckets, compare_files
from skyspot.rehearsal.compare.rules import Comparison
from skyspot.rehearsal.verdict import History, Verdict

CONTROL = Sides("first undisturbed", "second undisturbed")


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    buckets: Buckets
    history: History | None
    """None if the task does not use skyspot's trainer."""


def judge(
    first: Outcome, second: Outcome, rules: Comparison, *, across: bool = False, sides: Sides | None = None
) -> list[Verdict]:
    """Compare two runs: their files, and their histories if both have one. Empty if there is nothing to compare.

    Args:
        first: The undisturbed run.
        second: The other run.
        rules: What to compare, and how.
        across: True if the second changed its number of processes: only samples, learning rates and losses count.
        sides: Names of the two runs, for messages.
    """
    judged = []
    if rules.names_results and not across:
        judged.append(compare_files(rules, first.buckets, second.buckets, sides or Sides()))
    if first.history and second.history:
        if across:
            judged.append(verdict.compare_across_world_sizes(first.history, second.history))
        else:
            judged.append(verdict.compare(first.history, second.history, rules.ignored_keys))
    return judged


def control(first: Outcome, second: Outcome, rules: Comparison, *, across: bool = False) -> Verdict | None:
    """Compare two undisturbed runs; the verdict if they differ, which makes every other comparison worthless."""
    judged = judge(first, second, rules, across=across, sides=CONTROL)
    found = next((one for one in judged if one.checked and not one.exact), None)
    if found is None:
        return None
    difference = found.text.removeprefix("NOT exact: ")
    text = f"not reproducible by itself: not checked; first difference between two undisturbed runs: {difference}"
    return dataclasses.replace(found, checked=False, text=text, cause="not reproducible", first_step=found.first_step)
