"""The ways to lose a machine, and a seeded schedule of when."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from skyspot.rehearsal.watch import find_run, is_committed, walk
from trainer.layout.names import MANIFEST, list_checkpoints

KINDS = ("kill", "aws-notice", "sigterm", "kill-in-save", "torn")


@dataclass(frozen=True)
class Preemption:
    """One loss of a machine."""

    kind: str
    at_step: int | None = None
    """Strike when this many steps of the run are done."""
    after_resume: int | None = None
    """Strike so many steps after the attempt's first."""
    at_fraction: float | None = None
    """Of the seconds that the undisturbed run went on after its first write, counted from the attempt's first write:
    for tasks that say nothing of steps."""


def schedule(kinds: list[str], count: int, seed: int, *, steps: int | None, first_save: int | None) -> list[Preemption]:
    """Where a run of so many steps loses its machines.

    The first comes before the first checkpoint, and one within three steps of a resume; the others are spread over the
    run. Kinds take turns, each at least once where there are enough preemptions.

    Args:
        kinds: Which kinds.
        count: How many preemptions.
        seed: Of the exact steps.
        steps: How many steps the run has; None where the task does not say.
        first_save: The step of its first checkpoint, where that is known.
    """
    dice = random.Random(seed)
    ordered = [kind for kind in KINDS if kind in kinds]
    taken = [ordered[number % len(ordered)] for number in range(count)]
    if steps is None:
        # Each attempt goes on where the last one was: all of them together must not reach the end.
        return [Preemption(kind, at_fraction=dice.uniform(0.2, 0.8) / (count + 1)) for kind in taken]
    found = []
    for number, kind in enumerate(taken):
        if number == 0 and kind in ("kill", "sigterm", "aws-notice") and first_save and first_save > 1:
            found.append(Preemption(kind, at_step=dice.randint(1, max(1, first_save - 1))))
        elif number == 2:
            found.append(Preemption(kind, after_resume=dice.randint(1, 3)))
        else:
            low, high = steps * number // (count + 1), steps * (number + 1) // (count + 1)
            found.append(Preemption(kind, at_step=max(1, dice.randint(low, max(low, high - 1)))))
    return found


def tear(bucket: Path, run_folder: str | None) -> str | None:
    """Tear the newest checkpoint, as a mount does that was cut off: half of its largest file is gone.

    Of a task without our layout, the newest file in the bucket. Returns what was torn; None where there is nothing.
    """
    paths = find_run(bucket, run_folder)
    if paths:
        names = [name for name in list_checkpoints(paths) if is_committed(paths.checkpoint(name))]
        if not names:
            return None
        folder = paths.checkpoint(names[0])
        victim = max((path for path in folder.iterdir() if path.name != MANIFEST), key=lambda path: path.stat().st_size)
    else:
        files = [Path(path) for path, size in walk(bucket) if size > 1]
        if not files:
            return None
        victim = max(files, key=lambda path: path.stat().st_mtime_ns)
    os.truncate(victim, victim.stat().st_size // 2)
    return victim.relative_to(bucket).as_posix()
