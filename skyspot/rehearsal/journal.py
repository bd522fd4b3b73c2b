"""The journal of a task without checkpoints: a file that it appends its work to, and reads at each start to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skyspot.rehearsal import naming
from skyspot.rehearsal.appended import is_read
from skyspot.rehearsal.bucketfs.strike import Strike, points
from skyspot.rehearsal.lives import Life
from skyspot.rehearsal.replay import Attempt, Bucket, Written
from skyspot.rehearsal.resumes import FIRST, LOST_WORK, NOT_SEEN, NOTHING_THERE, RESUMED, Resume
from skyspot.rehearsal.saves import Learnt, Save, SavedFile, State

ROOM = 0.8
"""The part of it after which nothing is struck any more."""
ENOUGH = 0.1
"""The part of it that must be there, or a start from nothing would look the same."""
_NOTHING = State((), (), (), None)


def follow(learnt: Learnt, attempts: Sequence[Attempt]) -> tuple[Life, ...]:
    """Judge all attempts of a leg of a task with a journal."""
    bucket, lives, size = Bucket(), [], 0
    for number, attempt in enumerate(attempts, start=1):
        if attempt.listing is not None:
            size = attempt.listing.get(learnt.journal, 0)
        written = bucket.replay(attempt)
        left = written.left[learnt.journal].size if learnt.journal in written.left else 0
        resume = _judge(learnt, written, attempt, size, left) if number > 1 else _first()
        # Half of a line, or of several, is there: the result tells what comes of it.
        partly = any(call.struck == "middle" for call in written.calls[-1:])
        writes = [call.time for call in written.calls if call.name == "write" and call.path == learnt.journal]
        end = replace(_state(learnt, left, number, max(writes, default=written.began_s)), partly=partly)
        lives.append(Life(number, _state(learnt, size, number - 1), resume, (), end, None, (), 0.0))
        size = left
    return tuple(lives)


def _first() -> Resume:
    return Resume(FIRST, "it is the first attempt", None, None, (), (), (), 0)


def _judge(learnt: Learnt, written: Written, attempt: Attempt, start: int, end: int) -> Resume:
    newest = _saved(learnt, start, written.number - 1)
    if newest is None:
        return Resume(NOTHING_THERE, f"{learnt.journal} was empty", None, None, (), (), (), 0)
    if not is_read(learnt.journal, written):
        wrote = any(call.name == "write" and call.path == learnt.journal for call in written.calls)
        if not wrote and not attempt.finished:
            return Resume(NOT_SEEN, "it was taken before it wrote anything", None, newest, (), (), (), 0)
        why = f"it did not read {learnt.journal}, to which {start} bytes had been appended"
        return Resume(LOST_WORK, why, None, newest, (), (), (), 0)
    # One that goes on leaves a journal of the usual size; one from nothing leaves more than that, by what was there.
    if attempt.finished and end > learnt.journal_size + start / 2:
        why = f"it read {learnt.journal} but appended as much as a run from nothing ({learnt.journal_size} bytes)"
        return Resume(LOST_WORK, why, None, newest, (), (), (), 0, newest)
    doubt = ""
    if not attempt.finished:
        doubt = f"no attempt that had read {learnt.journal} came to its end"
    elif end <= start:
        doubt = f"{learnt.journal} was whole, and it had nothing left to do"
    elif start < ENOUGH * learnt.journal_size:
        doubt = f"only {start} bytes of {learnt.journal} were there to go on from; train longer"
    return Resume(RESUMED, f"it read {learnt.journal}", newest, newest, (), (), (), 0, None, doubt)


def _state(learnt: Learnt, size: int, attempt: int, written_s: float = 0.0) -> State:
    saved = _saved(learnt, size, attempt, written_s)
    return State((saved,), (), (), None) if saved else _NOTHING


def _saved(learnt: Learnt, size: int, attempt: int, written_s: float = 0.0) -> Save | None:
    """The journal as it is at one time, and when it was written to."""
    if size == 0:
        return None
    file = SavedFile(learnt.journal, 0, 0, written_s, written_s, size, False, 0)
    return Save(1, (), f"{size} bytes of {learnt.journal}", None, attempt, (file,), (), 0)


def strikes(learnt: Learnt, reference: Written) -> list[tuple[Strike, Strike, str]]:
    """Where strikes fall: (that in a first attempt, that in one which goes on, what it falls on)."""
    only = (naming.exactly(learnt.journal),)
    writes = [call for call in points(reference.calls, only=only) if call.name == "write"]
    third = len(writes) // 3
    found = []
    for phase, said in (("before", "before the"), ("middle", "in the middle of the")):
        # The first write of an attempt may be what it found there, without a torn last line.
        first, later = (Strike(number, phase, only, does="write") for number in (third, 1))
        found.append((first, later, f"{said} write to {learnt.journal} at {writes[third].offset}"))
    return found
