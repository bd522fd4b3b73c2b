"""The families of files: which kinds are written together, so that they make one save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skyspot.rehearsal import naming
from skyspot.rehearsal.replay import Version
from skyspot.rehearsal.slots import Slots, alike, in_step

_NEAR = 0.2
"""Of a run that saves once: the part of its time within which files belong to that save."""
_SAME_LABELS = 0.2
"""The part of two kinds' numbers that may be of one of them alone, and they are written together all the same."""


@dataclass(frozen=True)
class Family:
    """The kinds of files that make one save together."""

    kinds: tuple[str, ...]
    """Patterns."""
    places: dict[str, tuple[int, ...]]
    """For each kind whose names tell the save: at which numbers."""
    anchor: str
    """Without such a kind: the path that a save is counted by."""
    before: frozenset[str]
    """Kinds without a number that are written before the rest of their save, not after it: copies of the last one."""
    copies: frozenset[str]
    """Those of them that are copies of the last save's files."""
    read: frozenset[str]
    """The kinds that a later attempt has read."""
    saves: int
    """How many the undisturbed run made."""
    slots: Slots = ()
    """Where saves take turns between files, these; otherwise empty."""

    @property
    def anchors(self) -> frozenset[str]:
        """Without a kind whose names tell the save: the paths of which each save has one."""
        return frozenset(slot[0] for slot in self.slots) or frozenset({self.anchor})

    def kind_like(self, path: str) -> str:
        """The kind of the file at a path; the same for the files that slots have in common."""
        return naming.parse(alike(self.slots, path)[0]).kind

    def label_of(self, path: str) -> tuple[int, ...] | None:
        """The numbers that tell the save of a file; None if its name tells none."""
        name = naming.parse(path)
        places = self.places.get(name.kind)
        return naming.at(name.numbers, places) if places else None


def form(
    candidates: dict[str, list[Version]],
    paths: dict[int, str],
    read: dict[str, int],
    span_s: float,
    slots: Sequence[Slots] = (),
) -> list[Family]:
    """Form families of what an undisturbed run wrote.

    Args:
        candidates: The versions of each kind, in the order in which they were begun.
        paths: Where each version was put for good, by its number.
        read: The kinds that a later attempt has read.
        span_s: Seconds that the run took.
        slots: Files that saves take turns to write.
    """
    groups = _groups(candidates, paths, span_s, slots)
    return [_family(group, paths, read, _slots_of(group, slots)) for group in groups]


def _slots_of(kinds: Iterable[str], slots: Sequence[Slots]) -> Slots:
    """The slots whose files are of these kinds; empty if there are none."""
    known = set(kinds)
    return next((one for one in slots if _kinds(one) <= known), ())


def _kinds(slots: Slots) -> set[str]:
    return {naming.parse(path).kind for slot in slots for path in slot}


def fixed(candidates: dict[str, list[Version]], paths: dict[int, str]) -> dict[str, list[Version]]:
    """What was written to each path that does not tell its save, in the order in which it was begun."""
    found: dict[str, list[Version]] = {}
    for versions in candidates.values():
        if not naming.label_places([naming.parse(paths[version.number]) for version in versions]):
            for version in versions:
                found.setdefault(paths[version.number], []).append(version)
    return found


def _groups(
    candidates: dict[str, list[Version]], paths: dict[int, str], span_s: float, slots: Sequence[Slots]
) -> list[dict[str, list[Version]]]:
    """The kinds that are written in step: those whose names tell the same numbers, and those written as often."""
    labelled: list[tuple[set[tuple[int, ...]], dict[str, list[Version]]]] = []
    unlabelled: dict[tuple[str, ...], list[Version]] = {}
    """What is written once in each save, by the kinds of files that it is written to."""
    for kind, found in candidates.items():
        names = [naming.parse(paths[version.number]) for version in found]
        places = naming.label_places(names)
        if not places:
            turns = next((one for one in slots if kind in _kinds(one)), ())
            kinds = tuple(sorted(_kinds(turns) & set(candidates))) if turns else (kind,)
            unlabelled.setdefault(kinds, _once_a_save(turns or _longest(found, paths), kinds, candidates, paths))
            continue
        labels = {naming.at(name.numbers, places) for name in names}
        for others, group in labelled:
            if (
                _are_one(kind, group)
                and len(labels ^ others) <= max(1, int(_SAME_LABELS * max(len(labels), len(others))))
                and labels & others
            ):
                group[kind] = found
                others |= labels
                break
        else:
            labelled.append((labels, {kind: found}))
    groups = [group for _, group in labelled]
    rhythms = [_rhythm(group, paths) for group in groups]
    for kinds, found in sorted(unlabelled.items(), key=lambda one: -_weight(one[0][0], one[1])):
        for group, rhythm in zip(groups, rhythms, strict=True):
            if _are_one(kinds[0], group) and _in_step(rhythm, found, span_s):
                group.update({kind: candidates[kind] for kind in kinds})
                break
        else:
            groups.append({kind: candidates[kind] for kind in kinds})
            rhythms.append(found)
    return groups


def _longest(found: Sequence[Version], paths: dict[int, str]) -> Slots:
    """The path that was written most often, as the only slot."""
    return ((Counter(paths[version.number] for version in found).most_common(1)[0][0],),)


def _once_a_save(
    slots: Slots, kinds: Iterable[str], candidates: dict[str, list[Version]], paths: dict[int, str]
) -> list[Version]:
    """One version for each save: that of the slot's first file."""
    firsts = {slot[0] for slot in slots}
    found = [version for kind in kinds for version in candidates[kind] if paths[version.number] in firsts]
    return sorted(found, key=lambda version: version.begun)


def _are_one(kind: str, group: Iterable[str]) -> bool:
    """True unless one is a checkpoint of the best so far and the other of the last, however often that is the same."""
    return all(naming.is_best(kind) == naming.is_best(other) for other in group)


def _weight(kind: str, found: Sequence[Version]) -> int:
    """How likely a kind is the checkpoint's main file: by its name first, then by its size."""
    return (int(naming.looks_like_checkpoint(kind)) << 60) + max(version.size for version in found)


def _rhythm(group: dict[str, list[Version]], paths: dict[int, str]) -> list[Version]:
    """One version for each save of a group whose names tell the save: the first."""
    found: dict[tuple[int, ...], Version] = {}
    for versions in group.values():
        names = [naming.parse(paths[version.number]) for version in versions]
        places = naming.label_places(names)
        for version, name in zip(versions, names, strict=True):
            label = naming.at(name.numbers, places)
            if label not in found or version.begun < found[label].begun:
                found[label] = version
    return sorted(found.values(), key=lambda version: version.begun)


def _in_step(one: Sequence[Version], other: Sequence[Version], span_s: float) -> bool:
    """True if two files are written in turns; of files written once, whether that is at about the same time."""
    if len(one) == len(other) == 1:
        first, second = sorted((one[0], other[0]), key=lambda version: version.begun)
        return second.begun_s - first.closed_s <= _NEAR * span_s
    return in_step(one, other)


def _family(group: dict[str, list[Version]], paths: dict[int, str], read: dict[str, int], slots: Slots) -> Family:
    places = {}
    for kind, found in group.items():
        chosen = naming.label_places([naming.parse(paths[version.number]) for version in found])
        if chosen:
            places[kind] = chosen
    anchors = _rhythm({kind: group[kind] for kind in places}, paths)
    anchor = ""
    if not places:
        best = max(group, key=lambda kind: (_weight(kind, group[kind]), -group[kind][0].begun))
        anchor = paths[group[best][0].number]
        anchors = _once_a_save(slots or ((anchor,),), group, group, paths)
    of_anchors = {paths[one.number] for one in anchors}
    before = {
        kind
        for kind, found in group.items()
        if kind not in places
        and not any(paths[one.number] in of_anchors for one in found)
        and _comes_before(found, anchors)
    }
    slots = () if places else slots
    known = frozenset(set(group) & set(read))
    known |= _kinds(slots) if known & _kinds(slots) else set()  # Which slot a restart reads is chance.
    copies = frozenset(kind for kind in before if all(version.copy_of for version in group[kind]))
    return Family(tuple(sorted(group)), places, anchor, frozenset(before), copies, known, len(anchors), slots)


def _comes_before(found: Iterable[Version], anchors: Sequence[Version]) -> bool:
    """True if most versions were written just before an anchor rather than just after one."""
    votes = 0.0
    for version in found:
        after = [version.begun_s - one.closed_s for one in anchors if one.begun <= version.begun]
        until = [one.begun_s - version.closed_s for one in anchors if one.begun > version.begun]
        if after and until:
            votes += 1 if until[0] < after[-1] else -1
        else:
            votes += 0.5 if until else -0.5
    return votes > 0
