"""Where saves take turns between files, an attempt resumes from each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from skyspot.rehearsal import advice, faults, remedies, verdict
from skyspot.rehearsal.evidence import Evidence
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.remedies import Cause
from skyspot.rehearsal.result import Leg
from skyspot.rehearsal.resumes import RESUMED
from skyspot.rehearsal.tracing import Tracing

Run = Callable[[str, str, Preemption], Leg]
"""Runs and judges a leg with a name, a title and one strike."""


def try_each(tracing: Tracing, legs: Sequence[Leg], main: Leg, run: Run) -> None:
    """Have an attempt resume from each of the files that no other did; of a wrong result, name the file at fault.

    Args:
        tracing: What is known of the run's files, and of each attempt.
        legs: All legs, judged; `run` adds to them.
        main: The leg whose verdict tells of a file that none can resume from.
        run: Runs another.
    """
    found, firsts = tracing.evidence, tracing.slots()
    if not firsts or found is None:
        return
    wrong = [leg for leg in legs if _is_wrong(leg)]
    if wrong and not any(_has_no_cause(leg) for leg in wrong):
        return
    used = {path for leg in legs for path in used_by(found, leg, firsts)}
    for number, path in enumerate(firsts, 1):
        place = found.after_a_save(path) if wrong or path not in used else None
        if place:
            run(f"slot-{number}", f"Only {path}", Preemption(faults.AT_WRITE, place=place))
    if any(_is_wrong(leg) for leg in legs):
        _name_the_cause(legs, found, firsts)
        return
    firsts = tracing.slots()  # Restarts may have shown that one of them is no checkpoint.
    used = {path for leg in legs for path in used_by(found, leg, firsts)}
    unused = [path for path in firsts if path not in used]
    if unused and main.verdict and main.verdict.exact:
        why = f"saves take turns between {_listed(firsts)}, and no attempt resumed from {unused[0]}; train longer"
        main.verdict = verdict.Verdict(False, False, f"not checked: {why}")


def used_by(found: Evidence, leg: Leg, firsts: Sequence[str]) -> set[str]:
    """Which of these files the attempts of a leg resumed from."""
    resumed = [life.resume for life in found.lives(leg.name) if life.resume.outcome == RESUMED]
    return {file.path for one in resumed if one.used for file in one.used.files} & set(firsts)


def _name_the_cause(legs: Sequence[Leg], found: Evidence, firsts: Sequence[str]) -> None:
    """Where all results after a resume from some of the files alone are right, and all others are wrong, say so."""
    right = {path for leg in legs if leg.verdict and leg.verdict.exact for path in used_by(found, leg, firsts)}
    alone = [used for leg in legs if _is_wrong(leg) and len(used := used_by(found, leg, firsts)) == 1]
    faulty = sorted(set().union(*alone) - right)
    if not faulty or not right:
        return
    text = (
        f"{_listed(faulty)}: saves take turns between {_listed(firsts)}, and the result is right after a resume from "
        f"{_listed(sorted(right))} alone"
    )
    for leg in legs:
        if leg.verdict and _is_wrong(leg) and _has_no_cause(leg):
            leg.verdict = advice.with_cause(leg.verdict, Cause(text, remedies.ONE_SLOT))


def _is_wrong(leg: Leg) -> bool:
    return leg.verdict is not None and leg.verdict.checked and not leg.verdict.exact


def _has_no_cause(leg: Leg) -> bool:
    return leg.verdict is not None and leg.verdict.remedy == remedies.NO_CAUSE.remedy


def _listed(paths: Iterable[str]) -> str:
    return " and ".join(paths)
