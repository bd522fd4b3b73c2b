"""Adds causes and remedies to verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skyspot.rehearsal import faults, remedies
from skyspot.rehearsal.compare.repeated import REPEATED
from skyspot.rehearsal.refusals import Refusal
from skyspot.rehearsal.remedies import Cause
from skyspot.rehearsal.result import Row
from skyspot.rehearsal.verdict import Verdict

MOST_REFUSALS = 3
"""So many different refusals are named."""


def with_cause(verdict: Verdict, cause: Cause | None) -> Verdict:
    """Add a cause and its remedy, before the excerpt of the output if there is one; or what helps in general."""
    if cause is None:
        finding = remedies.REPEATED_LINES if verdict.cause == REPEATED else remedies.NO_CAUSE
        return replace(verdict, remedy=finding.remedy)
    first, line, rest = verdict.text.partition("\n")
    text = f"{first.removesuffix('.')}. Likely cause: {cause.text}{line}{rest}"
    return replace(verdict, text=text, remedy=cause.finding.remedy)


def after_failure(verdict: Verdict, refused: Sequence[Refusal], seen: Cause | None, struck: Row | None) -> Verdict:
    """Add why the last attempt failed, if that is known.

    Args:
        verdict: On the leg.
        refused: What its mounts refused to that attempt.
        seen: What the attempt read.
        struck: The attempt before that, if it was struck.
    """
    if refused:
        return with_cause(verdict, refused[-1].cause)
    if seen:
        return with_cause(verdict, seen)
    if struck and struck.kind in faults.AT_A_CALL:
        return replace(verdict, remedy=remedies.HALF_WRITTEN.remedy)
    return verdict


def with_exit(verdict: Verdict, early: Cause) -> Verdict:
    """Add that an attempt exited with 0 too early: as the cause of a wrong result, or else as a note."""
    if verdict.exact or verdict.checked:
        return verdict if verdict.exact else with_cause(verdict, early)
    return replace(verdict, notes=(*verdict.notes, f"{early.text}. Remedy: {early.finding.remedy}."))


def exited_early(rows: Sequence[Row]) -> Cause | None:
    """Name the attempt that exited with 0 at a notice or SIGTERM, before all was done; None if none did."""
    row = next((row for row in rows if row.exited_early), None)
    if row is None:
        return None
    text = f"attempt {row.number} {row.ended}, so that SkyPilot would mark this SUCCEEDED"
    return Cause(text, remedies.EXITED_WITH_0)


def with_refusals(verdict: Verdict, refused: Sequence[Refusal]) -> Verdict:
    """Note what the mounts refused beside a verdict that is not exact; an attempt went on all the same."""
    notes = dict.fromkeys(f"{one.text}. Remedy: {one.cause.finding.remedy}." for one in refused)
    return verdict if verdict.exact else replace(verdict, notes=(*verdict.notes, *list(notes)[:MOST_REFUSALS]))
