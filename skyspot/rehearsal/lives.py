"""The attempts of a leg, one after the other: what lay there, how each started, what it saved and left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from skyspot.rehearsal import newer, rework
from skyspot.rehearsal.replay import Attempt, Bucket, Written
from skyspot.rehearsal.resumes import FIRST, LOST_WORK, RESUMED, Judge, Resume
from skyspot.rehearsal.saves import Learnt, Save, State, bests, group, state


@dataclass(frozen=True)
class Life:
    """One attempt: what lay there, what it did, what it left."""

    number: int
    """From 1."""
    start: State
    resume: Resume
    saves: tuple[Save, ...]
    """Those that it made, finished or not."""
    end: State
    """What it left when it ended or was taken."""
    writing: Save | None
    """The save that was being written then."""
    again: tuple[Save, ...]
    """Those of its saves that had been complete in an earlier attempt."""
    again_s: float
    """Seconds that the undisturbed run took for what was done again up to these."""
    at_notice: Save | None = None
    """The save that it made when it got a notice or SIGTERM."""
    cut_off: bool = False
    """True if the machine was taken in the only save that it began after its notice or SIGTERM."""


def follow(learnt: Learnt, attempts: Sequence[Attempt]) -> tuple[Life, ...]:
    """Judge all attempts of one leg.

    Args:
        learnt: What the undisturbed run and the attempts taught: study() it with this leg first.
        attempts: The leg's, from its first.
    """
    follower = Follower(learnt)
    return tuple(follower.add(attempt) for attempt in attempts)


class Follower:
    """Judges the attempts of one leg, each as it comes."""

    def __init__(self, learnt: Learnt) -> None:
        """Begin before the first.

        Args:
            learnt: What the undisturbed run and the attempts taught.
        """
        self.learnt = learnt
        self.lives: list[Life] = []
        self._bucket = Bucket()
        self._before: list[Written] = []
        self._made: list[Save] = []
        self._notices = self._resumes = 0
        """So many attempts so far have had a notice or signal, have resumed and saved."""

    def add(self, attempt: Attempt) -> Life:
        """Judge the next attempt."""
        learnt, made, number = self.learnt, self._made, len(self.lives) + 1
        written = self._bucket.replay(attempt)
        _mark_cut(learnt, written, attempt)
        start = state(learnt.files, made, written.there, written.cut)
        fresh = group(learnt.files, written, learnt.saves)
        if number == 1:
            resume = Resume(
                FIRST, "it is the first attempt", None, None, (), (), (), rework.more(learnt, fresh, None, 0)
            )
        else:
            # At a notice, a script may save once more; after a resume, it may save again what it resumed from.
            extra = self._notices + self._resumes
            resume = Judge(learnt, start, made, fresh, written, attempt, extra, self._resumes).judge()
            resume = _beside_others(learnt, resume, self._before, written)
        self._notices += attempt.noticed_s is not None
        self._resumes += resume.outcome == RESUMED and any(save.complete is not None for save in fresh)
        if resume.used is not None:
            fresh = group(learnt.files, written, learnt.saves, resume.used.index)
        again = rework.again(learnt, fresh, made, resume.newest, resume.used)
        self._made = [*made, *fresh]
        end = state(learnt.files, self._made, written.left, written.left_cut)
        writing = next((save for save in reversed(fresh) if save.complete is None), None)
        if attempt.finished:
            writing = None
        again_s, at_notice = rework.seconds(learnt, again), _at_notice(fresh, attempt)
        cut_off = writing is not None and _is_first_since(writing, fresh, attempt.noticed_s)
        self._before.append(written)
        self.lives.append(Life(number, start, resume, tuple(fresh), end, writing, again, again_s, at_notice, cut_off))
        return self.lives[-1]


def _mark_cut(learnt: Learnt, written: Written, attempt: Attempt) -> None:
    """Mark the files that an attempt closed before it had written them, as a signal handler does that raises in a save.

    Such a file is empty, or was closed after the signal and is less than half as long as any of the undisturbed run's.
    """
    shortest: dict[str, int] = {}
    for save in learnt.saves:
        for file in save.files:
            shortest[file.kind] = min(file.size, shortest.get(file.kind, file.size))
    for version in written.versions:
        signalled = attempt.noticed_s is not None and version.closed_s >= attempt.noticed_s
        if version.closed is not None and 2 * version.size < shortest.get(learnt.files.kind_of(version), 0):
            version.cut = version.cut or not version.size or signalled
    written.left_cut |= {version.number for version in written.versions if version.cut}


def _beside_others(learnt: Learnt, resume: Resume, before: Sequence[Written], written: Written) -> Resume:
    """The verdict, with what was newer than the save that the attempt went on from."""
    used = resume.used
    if used is None or resume.outcome != RESUMED:
        return resume
    other = newer.checkpoint(learnt.files, used, before, written)
    if other is not None:
        read = next((one.path for one in resume.read if one.save == used.label), used.largest)
        why = f"it went on from {read} ({used.label}) though {other.largest}, which is newer, was complete"
        return replace(resume, outcome=LOST_WORK, why=why)
    best = bests(learnt.files, written, group(learnt.files, written, learnt.saves, used.index))
    too_early = best.get(used.index + 1, "") if used.index + 1 not in learnt.bests else ""
    return replace(resume, beside=newer.file(learnt.files, used, before, written), best=too_early)


def _at_notice(fresh: Sequence[Save], attempt: Attempt) -> Save | None:
    """The save that an attempt began after its notice or signal, and at which it left.

    One that trains on until it is taken saves at its usual times.
    """
    noticed_s = attempt.noticed_s
    if noticed_s is None or not attempt.left or not fresh or fresh[-1].begun_s < noticed_s:
        return None
    return fresh[-1]


def _is_first_since(save: Save, fresh: Sequence[Save], noticed_s: float | None) -> bool:
    """True if an attempt began this save after its notice or signal, and no other."""
    return noticed_s is not None and [one for one in fresh if one.begun_s >= noticed_s] == [save]
