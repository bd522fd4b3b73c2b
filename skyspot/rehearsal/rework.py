"""The work of an attempt against the undisturbed run's: done again, beyond its end, or passed over."""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.rehearsal.saves import Learnt, Save


def again(
    learnt: Learnt, fresh: Sequence[Save], made: Sequence[Save], newest: Save | None, used: Save | None
) -> tuple[Save, ...]:
    """The saves that had been made before."""
    numbers = [save.numbers for save in learnt.saves if save.numbers]
    if len(set(numbers)) < len(numbers):  # They tell a phase, or a fold, of several saves.
        done = [save for save in made if save.complete is not None]
        return tuple(fresh[: len(done) - (done.index(used) + 1 if used in done else 0)])
    if any(save.numbers for save in fresh):
        before = {save.numbers for save in made if save.complete is not None}
        return tuple(save for save in fresh if save.numbers in before)
    reached = newest.index if newest and used is not newest else 0
    return tuple(save for save in fresh if save.index <= reached)


def seconds(learnt: Learnt, repeated: Sequence[Save]) -> float:
    """Seconds that the undisturbed run took for some saves and the steps before each."""
    total = 0.0
    for save in repeated:
        before_s: float | None = learnt.began_s
        for one in learnt.saves:
            if one.numbers == save.numbers if save.numbers else one.index == save.index:
                total += one.complete_s - before_s if one.complete_s is not None and before_s is not None else 0.0
            before_s = one.complete_s
    return total


def is_numbered(learnt: Learnt, fresh: Sequence[Save]) -> bool:
    """True unless the numbers in an attempt's saves are all beyond the undisturbed run's, as times of day are."""
    own = next((save.numbers for save in fresh if save.numbers), ())
    return not (own and learnt.saves and learnt.saves[-1].numbers and own > learnt.saves[-1].numbers)


def more(learnt: Learnt, fresh: Sequence[Save], used: Save | None, allowance: int) -> int:
    """How many saves an attempt made beyond the undisturbed run's last."""
    if not learnt.saves:
        return 0
    last = learnt.saves[-1]
    if last.numbers and is_numbered(learnt, fresh):
        beyond = [save for save in fresh if len(save.numbers) == len(last.numbers) and save.numbers > last.numbers]
        return len(beyond)
    beyond_last = (used.index if used else 0) + len(fresh) - len(learnt.saves)
    return beyond_last if beyond_last > allowance else 0


def skipped(learnt: Learnt, fresh: Sequence[Save], used: Save, resumes: int) -> int:
    """How many of the undisturbed run's saves a leg passed over; 0 if that cannot be told.

    Args:
        learnt: What is known of the run.
        fresh: The saves of one attempt.
        used: What that went on from.
        resumes: How many attempts have resumed, if it is the last one; otherwise 0.
    """
    if learnt.irregular or not learnt.saves:
        return 0
    own = next((save.numbers for save in fresh if save.numbers), None)
    if own is not None and used.numbers:
        return len([save for save in learnt.saves if used.numbers < save.numbers < own])
    fewer = len(learnt.saves) - used.index - len(fresh)
    # A script that saves by the clock may save once less for one resume.
    return fewer if not used.numbers and resumes and fewer >= max(2, resumes) else 0
