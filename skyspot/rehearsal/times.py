"""The times of an attempt, what lay in the bucket when it ended, and what it did again."""

from __future__ import annotations

from skyspot.rehearsal.bucketfs.strike import changes
from skyspot.rehearsal.bucketfs.trace import Call
from skyspot.rehearsal.lives import Life
from skyspot.rehearsal.machine import Machine
from skyspot.rehearsal.replay import Attempt
from skyspot.rehearsal.result import Row
from skyspot.rehearsal.resumes import ALL_DONE, NOTHING_THERE
from skyspot.rehearsal.saves import State


def fill(row: Row, code: int | None, machine: Machine, ended_s: float) -> None:
    """Write into a row how its attempt left, and when it was struck.

    Args:
        row: The attempt's row.
        code: Its exit status; None: it was killed.
        machine: Its machine, which is gone.
        ended_s: When it ended, on the monotonic clock.
    """
    call, struck_s = machine.struck(), ended_s
    if row.struck:
        struck_s = call.time if call else machine.noticed_s if machine.noticed_s is not None else ended_s
    row.exit_code, row.after_s = code, round(struck_s - machine.started, 3)


def fill_from_trace(row: Row, attempt: Attempt, life: Life) -> None:
    """Write into a row what its attempt did on the bucket.

    Args:
        row: The attempt's row.
        attempt: Its trace.
        life: What the trace tells.
    """
    row.there, row.unproven = _named(life.end), _unproven(life)
    row.again_files = sum(len(save.files) for save in life.again)
    row.again_s = round(life.again_s, 3)
    if (noticed_s := attempt.noticed_s) is not None and not life.cut_off:
        row.saved_since = sum(save.complete_s is not None and save.complete_s > noticed_s for save in life.saves)
    if row.struck:
        row.last_write_s = _last_write_s(attempt)
        row.unsaved_s = round(_unsaved_s(attempt, life), 3)


def _unproven(life: Life) -> str:
    """Say why a start does not show whether the task survives the strike before it; empty if it does."""
    resume = life.resume
    if resume.outcome == NOTHING_THERE:
        return "no checkpoint was complete"
    if resume.outcome == ALL_DONE or (resume.doubt and not any(save.complete is not None for save in life.saves)):
        return "nothing was left to do"
    return "a start from nothing would look the same" if resume.doubt else ""


def is_passed_by(attempt: Attempt, life: Life) -> bool:
    """True if an attempt was struck at the upload of a save when a newer one was complete, so that it shows nothing."""
    path = next((call.path for call in attempt.calls if call.struck and call.name == "upload"), None)
    struck = [save for save in life.saves if any(file.path == path for file in save.files)]
    newest = life.end.newest
    return bool(struck) and newest is not None and struck[-1].index < newest.index


def _named(state: State) -> str:
    """Name the newest complete checkpoint, and one beside it that is not complete."""
    found = [state.newest.label] if state.newest else []
    found += [f"part of {state.incomplete[-1].label}"] if state.incomplete else []
    return ", ".join(found) or "nothing"


def _last_write_s(attempt: Attempt) -> float | None:
    """Seconds from the notice or signal to the last change of the bucket; None if there was none."""
    noticed_s = attempt.noticed_s
    if noticed_s is None:
        return None
    return max((round(call.time - noticed_s, 3) for call in attempt.calls if _changed(call) and call.time > noticed_s),
               default=None)  # fmt: skip


def _changed(call: Call) -> bool:
    done = not (call.error or call.refused or call.struck == "before")
    return done and (changes(call.name, call.flags, call.size) or call.name == "upload")


def _unsaved_s(attempt: Attempt, life: Life) -> float:
    """Seconds from an attempt's last checkpoint that was left to its end; if it made none, from its start."""
    struck_s = next((call.time for call in attempt.calls if call.struck), attempt.ended_s)
    own = [save.complete_s for save in life.end.complete if save.attempt == life.number and save.complete_s is not None]
    since_s = max(own, default=attempt.began_s)
    return max(0.0, struck_s - since_s) if struck_s is not None and since_s is not None else 0.0
