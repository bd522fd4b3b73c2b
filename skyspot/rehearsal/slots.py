"""Slots: files that saves take turns to write (`a.pt`, `b.pt`, `a.pt`, ...). A restart goes on from one alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from skyspot.rehearsal import naming
from skyspot.rehearsal.replay import Version, Written

Slots = tuple[tuple[str, ...], ...]
"""The paths of each slot's files, in the order in which a save writes them."""
_EVEN = 1 / 3
"""The training before each slot takes at least this part of the longest; files of one save come faster than that."""
_LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])|\d+")


def find(written: Mapping[str, Sequence[Version]], later: Sequence[Written]) -> list[Slots]:
    """Find the files that saves take turns to write.

    Args:
        written: What an undisturbed run wrote to each path that does not tell its save, in order.
        later: Attempts that began with what an earlier one had left.
    """
    groups: list[list[str]] = []
    for path in sorted(written, key=lambda one: written[one][0].begun):
        if len(written[path]) < 2 or naming.is_best(path) or not naming.looks_like_checkpoint(path):
            continue
        for group in groups:
            if in_step(written[group[0]], written[path]):
                group.append(path)
                break
        else:
            groups.append([path])
    found = [_split(group, written) for group in groups]
    return [slots for slots in found if len(slots) > 1 and not _is_refuted(slots, later)]


def in_step(one: Sequence[Version], other: Sequence[Version]) -> bool:
    """True if two files are written in turns."""
    ahead = 0
    turns = sorted([(version.begun, 1) for version in one] + [(version.begun, -1) for version in other])
    for _, turn in turns:
        ahead += turn
        if abs(ahead) > 1:
            return False
    return True


def _split(group: Sequence[str], written: Mapping[str, Sequence[Version]]) -> Slots:
    """The slots of files that are written one after the other, again and again; one if there is training after all."""
    order = sorted(((version, path) for path in group for version in written[path]), key=lambda one: one[0].begun)
    if any(path != group[number % len(group)] for number, (_, path) in enumerate(order)):
        return (tuple(group),)
    pauses: list[list[float]] = [[] for _ in group]
    for number, ((before, _), (after, _)) in enumerate(pairwise(order)):
        pauses[number % len(group)].append(after.begun_s - max(before.begun_s, before.closed_s))
    usual = [statistics.median(found) for found in pauses]
    ends = [number + 1 for number, pause in enumerate(usual) if pause >= _EVEN * max(usual) > 0]
    slots = tuple(tuple(group[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    alike = len({len(slot) for slot in slots}) == 1 and ends[-1:] == [len(group)]
    return slots if alike else (tuple(group),)


def _is_refuted(slots: Slots, later: Sequence[Written]) -> bool:
    """True if a restart passed over the newest of these files and read another, so that it is no checkpoint.

    Not so of files whose names differ in a letter or number alone.
    """
    if len({_LETTER.sub("#", path) for slot in slots for path in slot[:1]}) == 1:
        return False
    firsts = {slot[0] for slot in slots}
    for one in later:
        there = {path: version for path, version in one.there.items() if path in firsts}
        whole = [path for path, version in there.items() if version.number not in one.cut]
        newest = max(whole, key=lambda path: there[path].number, default=None)
        read = {reading.path for reading in one.readings} & firsts
        if one.number > 1 and read and newest is not None and newest not in read:
            return True
    return False


def alike(slots: Slots, path: str) -> tuple[str, ...]:
    """The paths at which each slot has the file that one of them has at this path; this path alone if none has it."""
    place = next((slot.index(path) for slot in slots if path in slot), None)
    return (path,) if place is None else tuple(slot[place] for slot in slots)
