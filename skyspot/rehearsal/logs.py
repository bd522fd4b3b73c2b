"""The logs of two runs, compared step by step: what differs first there, and which cause that tells of."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from skyspot.rehearsal import naming
from skyspot.rehearsal.watch import walk

LARGEST = 20_000_000
"""A log with more bytes is not read."""
REPEATED = 3
"""So many steps, at most, must repeat those of the start."""
_PAIR = re.compile(r"([A-Za-z_][\w./-]*)\s*[=: ]\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w:])")
_STEP = re.compile(r"(global_?|train_?)?(step|iter|iteration|update|round)s?", re.IGNORECASE)
_RATE = re.compile(r"(^|[^a-z])(lr|learning_?rate)([^a-z]|$)", re.IGNORECASE)
_ORDER = re.compile(r"sample|order|index|indices|shuffle", re.IGNORECASE)
_CLOCK = re.compile(
    r"time|elapsed|sec|dur|eta$|speed|throughput|per_|/s$|date|mem|(^|_)(s|ms|pid|host|rank)$", re.IGNORECASE
)

Value = float | str
Lines = dict[int, dict[str, Value]]
"""Step to what is logged there."""


def cause(reference: Path, other: Path) -> str | None:
    """Name the likeliest cause of a difference between two runs, from their logs; None if these tell nothing.

    Args:
        reference: The undisturbed run's bucket.
        other: The preempted run's.
    """
    found = []
    left, right = _read(reference), _read(other)
    for kind in sorted(left.keys() & right.keys()):
        step, keys = _first_difference(left[kind][1], right[kind][1])
        if step is not None:
            found.append((step, kind, keys))
    if not found:
        return None
    step, kind, keys = min(found)
    return _describe(left[kind][1], right[kind][1], step, keys, right[kind][0])


def _first_difference(left: Lines, right: Lines) -> tuple[int | None, list[str]]:
    """The first step that is logged differently, and the keys that differ there; those of the clock do not count."""
    steps = sorted(left.keys() & right.keys())
    for step in steps:
        common = [key for key in left[step] if key in right[step] and not _CLOCK.search(key)]
        keys = [key for key in common if left[step][key] != right[step][key]]
        if keys:
            # What differs in the first step of all differs by itself.
            return (None, []) if step == steps[0] else (step, keys)
    return None, []


def _describe(left: Lines, right: Lines, step: int, keys: list[str], path: str) -> str:
    rate = next((key for key in keys if _RATE.search(key)), None)
    again = next((key for key in keys if _repeats(left, right, step, key)), None)
    order = again or next((key for key in keys if _ORDER.search(key)), None)
    key = rate or order or keys[0]
    what = "the LR: " if rate else "the data order: " if order else ""
    if key == again:
        return f"{what}from step {step} on, {key} in {path} is what it was from step {min(left)} on"
    values = f"{left[step][key]} undisturbed, {right[step][key]} preempted"
    return f"{what}from step {step} on, {key} in {path} differs ({values})"


def _repeats(left: Lines, right: Lines, step: int, key: str) -> bool:
    """True if a run logs from a step on what the undisturbed run logged at its start."""
    first = sorted(left)[:REPEATED]
    after = sorted(number for number in right if number >= step)[: len(first)]
    pairs = [(left[one].get(key), right[two].get(key)) for one, two in zip(first, after, strict=False)]
    return len(pairs) == len(first) and all(one == two for one, two in pairs) and len({one for one, _ in pairs}) > 1


def _read(bucket: Path) -> dict[str, tuple[str, Lines]]:
    """Read the logs: kind of path to the newest file of that kind and its lines; of one step, the latest count."""
    files = [Path(path) for path, size in walk(bucket) if size <= LARGEST]
    found: dict[str, tuple[str, Lines]] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name)):
        path = file.relative_to(bucket).as_posix()
        if naming.looks_like_log(path):
            kind = naming.parse(path).kind
            lines = found.get(kind, ("", {}))[1]
            found[kind] = (path, lines)
            for text in file.read_text(errors="replace").splitlines():
                facts = _facts(text)
                step = next((value for key, value in facts.items() if _STEP.fullmatch(key)), None)
                if isinstance(step, float) and math.isfinite(step) and len(facts) > 1:
                    lines.setdefault(int(step), {}).update(facts)
    return found


def _facts(text: str) -> dict[str, Value]:
    """The names and values in a line of JSON, or of text like `step 3 loss=0.25`."""
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return {
            key: value if isinstance(value, str) else float(value)
            for key, value in found.items()
            if isinstance(value, str | int | float)
        }
    return {key: float(value) for key, value in _PAIR.findall(text[:2000])}
