"""Where a strike can fall within a save: before, in the middle of and after each call that changes the checkpoint."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skyspot.rehearsal import naming
from skyspot.rehearsal.bucketfs.strike import Strike, deed, points
from skyspot.rehearsal.bucketfs.trace import Call
from skyspot.rehearsal.files import CHECKPOINT, Files
from skyspot.rehearsal.saves import Save
from skyspot.rehearsal.slots import alike

CLEARS = ("unlink", "rmdir")
"""Calls that delete something."""


@dataclass(frozen=True)
class Boundary:
    """One place for a strike."""

    number: int
    """How many calls that count (those on `counted` paths) go through before it; as in `Strike`."""
    phase: str
    """before, middle or after; as in `Strike`."""
    description: str
    """`before rename of state.tmp to state.pt`; for a table."""
    temporary: bool = False
    """True if the file gets its own name later, by a rename."""


def counted(files: Files) -> str:
    """A regular expression of the paths that count for a strike: the checkpoint's files, and the folders above."""
    kinds = [kind.pattern for kind in files.kinds if kind.role == CHECKPOINT]
    kinds += [kind for kind in files.temporaries if files.becomes(kind) in kinds]
    wanted: set[str] = set()
    for kind in kinds:
        parts = kind.split("/")
        wanted |= {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return f"^(?:{'|'.join(sorted(map(naming.expression, wanted)))})$"


def boundaries(files: Files, calls: Sequence[Call], saves: Sequence[Save], save: Save) -> list[Boundary]:
    """Every place within one save.

    After a call is the same as before the next, so that `after` is given for the last call alone; and for the last of
    several deletions, because another attempt may delete in another save than the one in which it makes the next call.

    Args:
        files: What was learnt of the run's files.
        calls: All calls of the attempt that made the save: the undisturbed run's.
        saves: All saves of that attempt.
        save: One of these.
    """
    all_calls = points(calls, only=(counted(files),))
    first, last = _window(all_calls, saves, save)
    uploads = {call.number for call in arrivals(calls, saves, save)}
    found = []
    for number, call in enumerate(all_calls):
        if call.number not in uploads if call.name == "upload" else not first <= call.number <= last:
            continue
        temporary = naming.parse(call.path).kind in files.temporaries
        found.append(Boundary(number, "before", f"before the {describe(call)}", temporary))
        if call.name == "write" and call.size > 1 and _may_be_read(files, call.path):
            found.append(Boundary(number, "middle", f"in the middle of the {describe(call)}", temporary))
        following = all_calls[number + 1].name if number + 1 < len(all_calls) else ""
        if call.number == max(uploads | {last}) or (call.name in CLEARS and following not in CLEARS):
            found.append(Boundary(number, "after", f"after the {describe(call)}", temporary))
    return found


def that_prunes(files: Files, calls: Sequence[Call], saves: Sequence[Save], since: int) -> Save | None:
    """The first save from a place on, but for the last one, in which a file of a checkpoint is deleted; None: none."""
    all_calls = points(calls, only=(counted(files),))
    gone = [call for call in all_calls if call.name in CLEARS and naming.parse(call.path).kind not in files.temporaries]
    for save in saves[since:-1] if gone else ():
        first, last = _window(all_calls, saves, save)
        if save.complete is not None and any(first <= call.number <= last for call in gone):
            return save
    return None


def arrivals(calls: Sequence[Call], saves: Sequence[Save], save: Save) -> list[Call]:
    """The uploads of a save's files, where a file arrives in the bucket later than at its close.

    Empty if one of them never arrived, because another save wrote it again before.
    """
    found = []
    for file in save.files:
        since = file.begun if file.finished is None else file.finished
        upload = next(
            (one for one in calls if one.name == "upload" and one.path == file.path and one.number > since), None
        )
        again = (other.begun for one in saves for other in one.files if other.path == file.path)
        if upload is None or any(since < begun < upload.number for begun in again):
            return []
        found.append(upload)
    return found


def _may_be_read(files: Files, path: str) -> bool:
    """True unless restarts read other files of the checkpoint, and not this one."""
    read = files.family.read if files.family else frozenset()
    kind = naming.parse(path).kind
    return not read or (files.becomes(kind) or kind) in read


def strikes(files: Files, calls: Sequence[Call], places: Sequence[Boundary]) -> list[tuple[Strike, Strike, Strike]]:
    """For each place of one save: the strike that falls there, and those in an attempt's first and second save.

    Only calls on files like that one, which do the same, are counted. An attempt that finds a folder, or a file that an
    earlier one left, does some of the others no more.

    Args:
        files: What was learnt of the run's files.
        calls: All calls of the attempt that made the save.
        places: All places of the save.
    """
    like: dict[str, str] = {}
    sorts = []
    for call in points(calls, only=(counted(files),)):
        path = like.setdefault(call.path, _like(files, call.path))
        sorts.append((path, deed(call.name)))
    first = min((place.number for place in places), default=0)
    earlier = Counter(sorts[:first])
    found = []
    for place in places:
        path, does = sorts[place.number]
        within = sorts[first : place.number].count((path, does)) if does != "upload" else 0
        each = [sorts[one.number] for one in places if one.phase == "before"].count((path, does))
        strike = Strike(within, place.phase, (path,), does=does)
        before = earlier[path, does] + within if does != "upload" else sorts[: place.number].count((path, does))
        found.append((replace(strike, number=before), strike, replace(strike, number=within + each)))
    return found


def _like(files: Files, path: str) -> str:
    """A regular expression of a path and the same one of other saves; numbers that tell a rank or a shard stay."""
    return f"^(?:{'|'.join(sorted({_like_one(files, one) for one in _of_other_slots(files, path)}))})$"


def _of_other_slots(files: Files, path: str) -> list[str]:
    """A path, and where other slots have that file before it gets its own name."""
    slots = files.family.slots if files.family else ()
    name = naming.parse(path)
    if name.kind not in files.temporaries:
        return list(alike(slots, path))
    last = {naming.parse(other).kind for other in alike(slots, files.becomes(name.kind))}
    return [path, *(kind for kind in files.temporaries if "#" not in kind and files.becomes(kind) in last)]


def _like_one(files: Files, path: str) -> str:
    name, expression = naming.parse(path), ""
    told = files.family.places.get(files.becomes(name.kind) or name.kind, ()) if files.family else ()
    stays = [shard and place not in told for place, shard in enumerate(name.shards)]
    for part, spelled, same in zip(name.kind.split("#"), [*naming.spelled(path), ""], [*stays, True], strict=True):
        expression += re.escape(part) + (re.escape(spelled) if same else naming.ANY)
    return expression


def _window(calls: Sequence[Call], saves: Sequence[Save], save: Save) -> tuple[int, int]:
    """Numbers of the first and last call of a save, with the renames and unlinks around it that make room.

    What lies between two saves belongs to the one that is nearer in time.
    """
    order = saves.index(save)
    before_s = saves[order - 1].last_s if order else float("-inf")
    after_s = saves[order + 1].begun_s if order + 1 < len(saves) else float("inf")
    begun_s, last_s = save.begun_s, save.last_s
    within = [
        call.number
        for call in calls
        if begun_s <= call.time <= last_s
        or (before_s < call.time < begun_s and begun_s - call.time < call.time - before_s)
        or (last_s < call.time < after_s and call.time - last_s <= after_s - call.time)
    ]
    return min(within, default=save.begun), max(within, default=save.begun)


def sample(found: Sequence[Boundary], count: int, seed: int) -> list[Boundary]:
    """A spread sample: one place of each sort first (before a rename, in the middle of a write, ...), then others.

    Args:
        found: All places of one save.
        count: How many to take.
        seed: Random seed.
    """
    dice = random.Random(seed)
    sorts: dict[str, list[Boundary]] = {}
    for one in found:
        sorts.setdefault(naming.parse(one.description).kind, []).append(one)
    chosen = [dice.choice(places) for places in sorts.values()]
    if len(chosen) > count:
        # As far apart as can be: every n-th in the order of the save, from a random first.
        start = dice.random()
        chosen = [chosen[int((number + start) * len(chosen) / count)] for number in range(count)]
    rest = [one for one in found if one not in chosen]
    chosen += dice.sample(rest, min(len(rest), count - len(chosen)))
    return sorted(chosen, key=found.index)


def describe(call: Call) -> str:
    """Say what a call does: `rename of state.tmp to state.pt`, `write to state.pt at 4096`."""
    if call.name == "rename":
        return f"rename of {call.path} to {call.to}"
    if call.name == "write":
        return f"write to {call.path} at {call.offset}"
    if call.name == "open":
        return f"emptying of {call.path}"
    return f"{call.name} of {call.path}"


def typical(saves: Sequence[Save]) -> Save | None:
    """A save to strike: with most files, and early, to be quick.

    The third if there are enough. Two complete ones lie there then, so that a script that starts over shows: from the
    first, a resume makes as many saves as an undisturbed run if it saves again what it resumed from.
    """
    later = [save for save in saves[2:-1] or saves[1:] if save.complete is not None]
    return max(later, key=lambda save: (len(save.files), -save.index), default=None)
