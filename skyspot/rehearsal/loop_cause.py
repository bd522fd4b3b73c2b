"""The likeliest cause of a difference in a loop of the user's own: which rule of docs/your-own-script.md it breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyspot.rehearsal import remedies
from skyspot.rehearsal.loop_record import LoopRecord
from skyspot.rehearsal.remedies import Cause
from skyspot.wording import first_few

Lines = Mapping[int, Mapping[str, Any]]
"""The metrics of each step."""
MOST_NAMES = 3
"""So many names are listed."""


@dataclass(frozen=True)
class Runs:
    """Two runs of one loop."""

    left: Lines
    """The undisturbed run's metrics."""
    right: Lines
    record: LoopRecord
    """What the second run recorded."""


def cause(runs: Runs, step: int | None, weights: Sequence[str], logged: Sequence[str]) -> Cause | None:
    """Name the likeliest cause; None if nothing tells one.

    Args:
        runs: The two runs.
        step: The first step that differs; None: only weights do.
        weights: The names of the exported tensors that differ.
        logged: Names of metrics of the user's own.
    """
    if step and step in runs.left and step in runs.right and runs.record.resume_before(step) is None:
        return _by_itself(runs, step)
    if runs.record.loop not in ("steps", *_FRAMEWORKS):
        return None
    if step is None:
        return _in_weights(runs.record, weights)
    ends = max(runs.left, default=0), max(runs.right, default=0)
    if step not in runs.left or step not in runs.right:
        text = f"the undisturbed run ended at step {ends[0]}, this one at step {ends[1]}"
        return Cause(f"{text}: is what ends the loop (a counter, a best loss) in run.state?", remedies.UNSTATED)
    resumed = runs.record.resume_before(step)
    assert resumed is not None
    place = f"from step {step} on, {_ordinal(step - resumed)} after the resume from step {resumed}"
    if runs.record.loop in _FRAMEWORKS:
        return _in_framework(runs, step, place, logged)
    return _at(runs, step, place, logged)


_FRAMEWORKS = {"transformers": "the Trainer", "lightning": "Lightning"}
"""Who saves the state, by what the records call the loop."""


def _in_framework(runs: Runs, step: int, place: str, logged: Sequence[str]) -> Cause:
    """The cause of a difference that begins after a resume in a framework's loop, whose checkpoint has all of its own.

    So it is something of the program's: a callback, a collator, a hook.
    """
    record, left, right = runs.record, runs.left[step], runs.right[step]
    who = _FRAMEWORKS[record.loop]
    if rate := _rate(left, right):
        what = f"the learning rate differs {place} ({rate[1]:.6g} undisturbed, {rate[2]:.6g} preempted)"
        return Cause(f"{what}: does {who} save the scheduler, or what else sets the rate?", remedies.KEPT_APART)
    if record.unsaved:
        return _unsaved(record, f"{_first(left, right, logged)} differs {place}")
    if left.get("batch") != right.get("batch"):
        what = f"the batches differ {place}: other samples, or other random numbers in them"
        asked = f"Does {who} save what draws them (a generator of the data set, the sampler or the collator)?"
        return Cause(f"{what}. {asked}", remedies.KEPT_APART)
    if found := _in_streams_or_logged(runs, step, place, logged):
        return found
    same = "the same learning rate" + (" and the same batches" if "batch" in left else "")
    what = f"the loss differs {place}, with {same}: something that steps change is not in the checkpoint of {who}"
    return Cause(f"{what} (a callback's counter, an EMA)", remedies.KEPT_APART)


def _at(runs: Runs, step: int, place: str, logged: Sequence[str]) -> Cause:
    """The cause of a difference that begins at a step after a resume."""
    record, left, right = runs.record, runs.left[step], runs.right[step]
    if rate := _rate(left, right):
        name, undisturbed, preempted = rate
        of = f" of {name!r}" if name and len(left.get("rates", {})) > 1 else ""
        what = f"the learning rate{of} differs {place} ({undisturbed:.6g} undisturbed, {preempted:.6g} preempted)"
        asked = "is the scheduler registered?"
        if name in record.scheduled:  # Code around the loop runs again in each attempt.
            asked = "its scheduler is registered; is it stepped, or the rate set, outside the loop?"
        return Cause(f"{what}: {asked} {_registered(record)}", remedies.UNSCHEDULED)
    if record.unsaved:
        return _unsaved(record, f"{_first(left, right, logged)} differs {place}")
    if "streams" in left and "batch" not in left:
        what = f"the loss differs {place}. No tensor came from run.steps(...): does the loop read its data elsewhere?"
        return Cause(what, remedies.ELSEWHERE)
    if left.get("batch") != right.get("batch"):
        what = f"the batches differ {place}: other samples, or other random numbers in them. Is what draws them (a "
        return Cause(f"{what}generator, a stateful loader) registered? {_registered(record)}", remedies.BATCHES)
    if found := _in_streams_or_logged(runs, step, place, logged):
        return found
    what = f"the loss differs {place}, with the same learning rate and random numbers"
    what += ", and the same batches: something that steps change is not registered"
    return Cause(f"{what}. {_registered(record)}", remedies.UNREGISTERED)


def _in_streams_or_logged(runs: Runs, step: int, place: str, logged: Sequence[str]) -> Cause | None:
    """The cause if random numbers differ, or a metric of the user's own alone; else None. The batches are the same."""
    left, right = runs.left[step], runs.right[step]
    if streams := _streams(runs, step):
        return Cause(f"the random numbers of {first_few(streams, MOST_NAMES)} differ {place}", remedies.STREAMS)
    return _in_logged(left, right, place, logged) if left.get("loss") == right.get("loss") else None


def _in_logged(left: Mapping[str, Any], right: Mapping[str, Any], place: str, logged: Sequence[str]) -> Cause:
    """The cause of a difference in a metric of the user's own alone."""
    name = _first_logged(left, right, logged)
    values = f"{left.get(name)} undisturbed, {right.get(name)} preempted"
    what = f"the logged {name} differs {place} ({values}), and the loss does not"
    return Cause(f"{what}: is what it is computed from in run.state?", remedies.UNSTATED)


def _first(left: Mapping[str, Any], right: Mapping[str, Any], logged: Sequence[str]) -> str:
    """What differs: the loss, or a metric of the user's own."""
    same = left.get("loss") == right.get("loss")
    return f"the logged {_first_logged(left, right, logged)}" if same else "the loss"


def _first_logged(left: Mapping[str, Any], right: Mapping[str, Any], logged: Sequence[str]) -> str:
    return next((name for name in logged if left.get(name) != right.get(name)), "grad_norm")


def _by_itself(runs: Runs, step: int) -> Cause:
    """The cause of a difference between runs of which none was resumed before it."""
    if step == min(runs.left) or _streams(runs, step):
        return Cause(f"the random numbers differ from step {step} on: is the script seeded?", remedies.SEEDS)
    return Cause(
        f"step {step} gives another result with the same random numbers: its operations are not deterministic",
        remedies.NONDETERMINISTIC,
    )


def _streams(runs: Runs, step: int) -> list[str]:
    """The random streams that differ at a step and did not at the first: one that nobody seeds or uses always does."""
    first = min(runs.left)
    if first not in runs.right:
        return []
    begin = [_hashes(one[first]) for one in (runs.left, runs.right)]
    now = [_hashes(one[step]) for one in (runs.left, runs.right)]
    return [name for name in now[0] if begin[0].get(name) == begin[1].get(name) and now[0][name] != now[1].get(name)]


def _hashes(line: Mapping[str, Any]) -> Mapping[str, Any]:
    found = line.get("streams")
    return found if isinstance(found, Mapping) else {}


def _in_weights(record: LoopRecord, weights: Sequence[str]) -> Cause:
    verb = "differs" if len(weights) == 1 else "differ"
    what = f"{first_few(weights, MOST_NAMES)} {verb} in the exported model, and no loss does"
    if record.unsaved:
        return _unsaved(record, what)
    if record.loop in _FRAMEWORKS:
        return Cause(f"{what}: does {_FRAMEWORKS[record.loop]} save what computes them?", remedies.KEPT_APART)
    return Cause(f"{what}: is what computes them registered? {_registered(record)}", remedies.UNREGISTERED)


def _unsaved(record: LoopRecord, what: str) -> Cause:
    many = len(record.unsaved) > 1
    verbs = "change during training and are" if many else "changes during training and is"
    named = f"{first_few(record.unsaved, MOST_NAMES)} {verbs}"
    return Cause(f"{what}; {named} in no state_dict", remedies.UNSAVED)


def _rate(left: Mapping[str, Any], right: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """The first learning rate that differs: the optimizer's name, where it is known, and both values."""
    ours, theirs = left.get("rates"), right.get("rates")
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name, value in ours.items():
            if value != theirs.get(name) and isinstance(value, float) and isinstance(theirs.get(name), float):
                return (name, value, theirs[name])
    if left.get("lr") != right.get("lr") and all(isinstance(one.get("lr"), float) for one in (left, right)):
        return ("", left["lr"], right["lr"])
    return None


def _registered(record: LoopRecord) -> str:
    named = ", ".join(f"{name} ({kind})" for name, kind in record.objects.items())
    return f"Registered: {named or 'nothing'}"


def _ordinal(count: int) -> str:
    return "the first" if count == 1 else f"{count} steps"
