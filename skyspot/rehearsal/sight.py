"""How much is seen of a bucket where it cannot be served through FUSE, and what that proves."""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.errors import UsageError
from skyspot.rehearsal import evidence, faults
from skyspot.rehearsal.bucketfs.trace import CALLS, EVENTS, GAP, POLLS, Call
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.lives import Life
from skyspot.rehearsal.resumes import RESUMED
from skyspot.rehearsal.saves import Learnt, Save
from skyspot.rehearsal.verdict import Verdict

NOT_TRIED = {CALLS: (), EVENTS: ("torn", "kill-at-write"), POLLS: faults.AT_A_CALL}
"""Kinds of preemptions for which too little is seen."""
_UNSEEN = {
    EVENTS: "its file events were watched. Not seen: which process it was, how much of a file was read, where each "
    "write began and ended. It behaves like a local disk.",
    POLLS: "its files were looked at again and again. Not seen: which process it was, any read, where each write began "
    "and ended. It behaves like a local disk.",
}


def note(sight: str, point: str, missing: str) -> str:
    """Say what of a bucket is not seen.

    Args:
        sight: EVENTS or POLLS.
        point: The bucket's mount point.
        missing: Why it was not served through FUSE.
    """
    return f"{point} was not served through FUSE ({missing}): {_UNSEEN[sight]}"


def tried(sight: str, plan: Sequence[Preemption], missing: str) -> list[Preemption]:
    """List the preemptions that can be tried.

    Args:
        sight: EVENTS or POLLS.
        plan: All that are planned.
        missing: Why buckets are not served through FUSE.

    Raises:
        UsageError: there are none.
    """
    found = [one for one in plan if one.kind not in NOT_TRIED[sight]]
    if plan and not found:
        raise UsageError(f"--kinds {plan[0].kind}: it needs FUSE ({missing}). Add a kind that does not: --kinds kill")
    return found


def gap(calls: Sequence[Call]) -> str:
    """Say why some calls of a trace were missed; empty if none were."""
    return next((call.to for call in calls if call.name == GAP), "")


def judge(
    sight: str, learnt: Learnt, lives: Sequence[Life], same: bool, *, missing: str = "", missed: str = ""
) -> Verdict | None:
    """Judge whether the attempts of a leg resumed; None if they did, as far as it is asked for.

    File events tell less than calls, so each attempt that had a checkpoint must have been seen to read it.

    Args:
        sight: CALLS, EVENTS or POLLS.
        learnt: What is known of the run's files.
        lives: The attempts.
        same: True if the leg's result is the undisturbed run's.
        missing: Why no more is seen.
        missed: Why some calls were missed.
    """
    if missed:
        return _unknown(f"some of what the task did on its bucket was missed: {missed}") if same else None
    found = evidence.judge(learnt, lives, same)
    if sight == CALLS or not same or (found and found.checked):
        return found
    if sight == POLLS:
        return _unknown(f"whether it resumed cannot be seen here, because {missing}")
    return found or next((_unknown(why) for life in lives[1:] if (why := _not_read(life))), None)


def _not_read(life: Life) -> str:
    newest, resume = life.start.newest, life.resume
    if newest is None:
        return ""
    name = f"{newest.largest} ({newest.label})"
    if resume.outcome != RESUMED or resume.used is None or not resume.read:
        return f"attempt {life.number} was not seen to read {name}, which was complete"
    if not any(one.seen for one in resume.read if one.save == resume.used.label):
        return f"attempt {life.number} opened {name} and was not seen to read it; a file mapped into memory needs FUSE"
    return ""


def _unknown(why: str) -> Verdict:
    return Verdict(False, False, f"not checked: {why}")


def is_incomplete(learnt: Learnt, life: Life) -> bool:
    """True if an attempt surely left its last save incomplete.

    A kill closes every file. So a file in its place that is as large as the undisturbed run's may be whole.
    """
    save = life.saves[-1] if life.saves else None
    if save is None or save.complete is not None:
        return False
    return bool(save.missing) or any(_is_short(learnt, save, order) for order in range(len(save.files)))


def _is_short(learnt: Learnt, save: Save, order: int) -> bool:
    file = save.files[order]
    if file.finished is not None:
        return False
    sizes = [other.size for one in learnt.saves for other in one.files if other.kind == file.kind]
    renamed = any(learnt.files.becomes(kind) == file.kind for kind in learnt.files.temporaries)
    return renamed or file.size < min(sizes, default=0)
