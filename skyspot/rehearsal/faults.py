"""The kinds of preemption, and their seeded schedule."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from skyspot.rehearsal.boundaries import CLEARS
from skyspot.rehearsal.evidence import Place, chosen
from skyspot.rehearsal.watch import find_run, is_committed, walk
from trainer.layout.clouds import NOTICE_S
from trainer.layout.names import MANIFEST, list_checkpoints


@dataclass(frozen=True)
class Warned:
    """How a task learns that its machine will be taken."""

    label: str
    """What it gets, for the table."""
    cloud: str
    """The machine's cloud, as SkyPilot names it."""
    notice_s: float
    """Seconds until the machine is taken."""
    signal: signal.Signals | None = None
    """None: the cloud's metadata service announces it."""
    tells_time: bool = True
    """False: the announcement does not tell how much time is left."""


TERM_PATIENCE_S = 45.0
"""Seconds from SIGTERM to SIGKILL."""
WARNED = {
    "aws-notice": Warned("spot notice", "aws", NOTICE_S["aws"]),
    "sigterm": Warned("SIGTERM", "aws", TERM_PATIENCE_S, signal.SIGTERM),
    "gcp-notice": Warned("spot notice", "gcp", NOTICE_S["gcp"], tells_time=False),
    "azure-notice": Warned("spot notice", "azure", NOTICE_S["azure"]),
    "slurm-signal": Warned("SIGUSR1", "slurm", 120.0, signal.SIGUSR1),
    "runpod-signal": Warned("SIGTERM", "runpod", NOTICE_S["runpod"], signal.SIGTERM),
    "kill-after-30s": Warned("SIGTERM", "kubernetes", 30.0, signal.SIGTERM),
}
"""Preemptions before which the task may save."""
DEFAULT_KINDS = ("kill", "aws-notice", "sigterm", "kill-in-save", "torn")
"""In the order in which they take turns."""
AT_WRITE = "kill-at-write"
"""The kind whose strikes are told apart by their places in a save."""
KINDS = (*DEFAULT_KINDS, AT_WRITE, *(kind for kind in WARNED if kind not in DEFAULT_KINDS))
"""All kinds."""
AT_A_CALL = ("kill-in-save", "torn", AT_WRITE)
"""Kinds that fall on one call of a save where each call is seen."""

CLOUD = "aws"
"""The cloud of a machine whose task gets no warning."""

_DELETED = tuple(f"after the {call} of" for call in CLEARS)


@dataclass(frozen=True)
class Preemption:
    """One planned loss of a machine."""

    kind: str
    at_step: int | None = None
    """Preempt after this many steps of the run."""
    after_resume: int | None = None
    """Preempt this many steps after the attempt's first step."""
    at_fraction: float | None = None
    """Preempt after this fraction of the undisturbed run's duration. Both are counted from the first write to the
    bucket. For tasks that do not record steps."""
    saved: bool = False
    """Preempt only once a checkpoint is complete. For tasks that record steps."""
    place: Place | None = None
    """Preempt at this call of a save."""

    @property
    def at_place(self) -> str | None:
        """The call of a save, as `--at` names it; None: it falls at a time."""
        return self.place.description if self.place else None


def cloud_of(kind: str) -> str:
    """The cloud of a machine that is taken in this way, as SkyPilot names it."""
    return WARNED[kind].cloud if kind in WARNED else CLOUD


def schedule(kinds: list[str], count: int, seed: int, *, steps: int | None, first_save: int | None) -> list[Preemption]:
    """Plan the preemptions of a run.

    The first one comes before the first checkpoint, and one within three steps of a resume; the others are spread over
    the run. Kinds take turns; each comes at least once if there are enough preemptions. A kill before the first
    checkpoint proves nothing, so that the only one comes after it; what gets a notice saves then.

    Args:
        kinds: The kinds to use.
        count: The number of preemptions.
        seed: Random seed for the exact steps.
        steps: The number of steps in the run; None if the task does not record them.
        first_save: The step of its first checkpoint, if known.
    """
    dice = random.Random(seed)
    ordered = [kind for kind in KINDS if kind in kinds]
    taken = [ordered[number % len(ordered)] for number in range(count)]
    if steps is None:
        # Each attempt continues where the last one stopped, so all of them together must not reach the end.
        return [Preemption(kind, at_fraction=dice.uniform(0.2, 0.8) / (count + 1)) for kind in taken]
    found = list[Preemption]()
    for number, kind in enumerate(taken):
        saves = first_save is not None and first_save < steps
        early = number == 0 and (kind in WARNED or (kind == "kill" and (taken.count(kind) > 1 or not saves)))
        if early and first_save and first_save > 1:
            found.append(Preemption(kind, at_step=dice.randint(1, first_save - 1)))
            continue
        proves = saves and kind == "kill"
        if number == 2:
            found.append(Preemption(kind, after_resume=dice.randint(1, 3), saved=proves))
            continue
        low, high = steps * number // (count + 1), steps * (number + 1) // (count + 1) - 1
        low = max(low, (found[-1].at_step or 0) + 1) if found else low
        if proves and first_save:
            low, high = max(low, first_save + 1), max(high, first_save * 3 // 2)
        low = min(low, steps - 1)
        found.append(Preemption(kind, at_step=max(1, dice.randint(low, max(low, min(high, steps - 1)))), saved=proves))
    return found


def at_calls(
    plan: Sequence[Preemption], places: Sequence[Place], seed: int, *, tears: bool, every: bool
) -> list[Preemption]:
    """Have the preemptions that concern a save fall on calls of it, where each call is seen.

    Args:
        plan: The preemptions, by time.
        places: Every place in a save.
        seed: Random seed for which places.
        tears: True if a kill can leave a file half written on this kind of mount; otherwise none is torn.
        every: True: one `kill-at-write` for each place, after all others.
    """
    # A file that is cut under its own name does more harm than one that would have been renamed later.
    cuts = sorted((place for place in reversed(places) if place.later.phase == "middle"), key=lambda one: one.temporary)
    kinds = [one.kind for one in plan]
    within = _hardest(_within(places), kinds.count("kill-in-save"), seed)
    others = _hardest([place for place in places if place not in within], kinds.count(AT_WRITE), seed)
    turns = {"kill-in-save": iter(within), AT_WRITE: iter(() if every else others)}
    torn = iter(cuts * len(plan)) if tears else iter(())
    found = []
    for one in plan:
        if one.kind == "torn":
            place = next(torn, None)
        elif one.kind in turns:
            place = next(turns[one.kind], None)
        else:
            found.append(one)
            continue
        if place is not None:
            found.append(replace(one, at_fraction=None, place=place))
    if every:
        found += [Preemption(AT_WRITE, place=place) for place in places]
    return found


def _within(places: Sequence[Place]) -> list[Place]:
    """List the places at which a save is begun and not over; all, if there are none."""
    begun = next((number for number, place in enumerate(places) if place.later.does != "mkdir"), 0) + 1
    writes = [place.later.phase != "after" and place.later.does not in CLEARS for place in places]
    over = max((number for number, does in enumerate(writes) if does), default=-1)
    return list(places[begun : over + 1]) or list(places)


def _hardest(places: Sequence[Place], count: int, seed: int) -> list[Place]:
    """Choose places: first those at which most is missing, then a sample.

    Most is missing where older saves were deleted before the last file of this one was put into its place; then where
    that file alone is old or missing.
    """
    put = "before the rename", "before the create", "before the upload"
    last = [one for one in places if one.description.startswith(put)][-1:]
    before = places[: places.index(last[0])] if last else []
    cleared = [one for one in before if one.description.startswith(_DELETED) and not one.temporary][-1:]
    first = cleared + last
    return (first + [one for one in chosen(places, count, seed) if one not in first])[:count]


def tear(bucket: Path, run_folder: str | None) -> str | None:
    """Tear the newest checkpoint as an interrupted mount would: cut its largest file in half.

    Without our layout, tear the newest file in the bucket. Return the torn file; None if there was none.
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
