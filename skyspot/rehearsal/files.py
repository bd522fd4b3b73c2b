"""The kinds of files in a bucket: which are checkpoints, and which are logs, results, settings or scratch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skyspot.rehearsal import naming, slots
from skyspot.rehearsal.bucketfs.trace import Call
from skyspot.rehearsal.families import Family, fixed, form
from skyspot.rehearsal.replay import Version, Written
from skyspot.wording import first_few

CHECKPOINT, LOG, RESULT, SETTINGS, SCRATCH, OTHER = "checkpoint", "log", "result", "settings", "scratch", "other"
TOLD, NAMED = "--checkpoint names it", "it is a log"
_SHOWN = 6
"""So many kinds are named."""
_STREAM_S = 1.0
_STREAM_WRITE = 64 * 1024
"""Bytes: a file that is open for half of the run and written in smaller pieces is a log."""


@dataclass(frozen=True)
class Kind:
    """Files whose names differ in numbers and random parts alone."""

    pattern: str
    """The path with `#` for each of these."""
    role: str
    """checkpoint, log, result, settings (written once at the start), scratch (temporary) or other."""
    why: str
    """The reason, as part of a sentence."""
    written: int
    """How many times the undisturbed run wrote one."""
    size: int
    """Bytes of the largest."""
    example: str
    """One path."""


@dataclass(frozen=True)
class Files:
    """What was learnt of a run's files."""

    kinds: tuple[Kind, ...]
    """Checkpoints first."""
    family: Family | None
    """The files of its checkpoints; None: it seems to write none."""
    temporaries: dict[str, str]
    """Kinds that are renamed into another, and that kind."""
    trust: str
    """Why these are the checkpoints. told: the user named them; read: a later attempt read them; named: their names
    are such; guessed: there is nothing else, and no attempt has had the chance to read them. Empty: there are none."""
    last: Family | None = None
    """Other checkpoints, if those of `family` are the best ones: written more often, of their size, and never read."""

    def role(self, path: str) -> str:
        """The role of the file at a path; `other` if the undisturbed run wrote none like it."""
        pattern = naming.parse(path).kind
        return next((kind.role for kind in self.kinds if kind.pattern == pattern), OTHER)

    def logged(self, calls: Iterable[Call]) -> int:
        """Bytes that an attempt wrote to the run's logs."""
        return sum(call.size for call in calls if call.name == "write" and self.role(call.path) == LOG)

    def place(self, version: Version) -> tuple[int, float, str] | None:
        """Where a version was put for good: (call, time, path); None: it was temporary, and never renamed."""
        return next((one for one in version.places if naming.parse(one[2]).kind not in self.temporaries), None)

    def original(self, version: Version) -> Version:
        """What a copy of the last checkpoint was made of, where the run makes such copies; else the version itself."""
        copies = self.family.copies if self.family else ()
        return version.copy_of if version.copy_of and self.kind_of(version) in copies else version

    def kind_of(self, version: Version) -> str:
        """The kind of the file that a version is, or would have become."""
        home = naming.parse(self.home(version)).kind
        return self.becomes(home) or home

    def becomes(self, kind: str) -> str:
        """The kind that files of a temporary kind are renamed into; empty if it is not temporary."""
        target = self.temporaries.get(kind, "")
        for _ in self.temporaries:
            target = self.temporaries.get(target, target)
        return target

    def home(self, version: Version) -> str:
        """The path at which a version was put for good or would have been; its last path if that is not known."""
        place = self.place(version)
        if place:
            return place[2]
        name = naming.parse(version.path)
        target = self.becomes(name.kind)
        if target.count("#") == len(name.numbers) and None not in name.numbers:
            # The numbers as they are spelled: 0010.
            for number in naming.spelled(version.path):
                target = target.replace("#", number, 1)
        return target if "#" not in target else version.path


def told(kinds: Sequence[Kind]) -> str:
    """Name the kinds that are checkpoints and those that are not: `checkpoints: a/#.pt; not struck: log.txt (log)`."""
    struck = [kind.pattern for kind in kinds if kind.role == CHECKPOINT]
    others = [f"{kind.pattern} ({kind.role})" for kind in kinds if kind.role not in (CHECKPOINT, SCRATCH)]
    found = [f"checkpoints: {first_few(struck, _SHOWN) or 'none'}"]
    return "; ".join([*found, f"not struck: {first_few(others, _SHOWN)}"] if others else found)


def learn(
    reference: Written,
    later: Sequence[Written] = (),
    results: Sequence[str] = (),
    checkpoints: Sequence[str] = (),
) -> Files:
    """Tell the files of a run apart.

    Args:
        reference: The undisturbed run.
        later: Attempts that began with what an earlier one had left; what they read are checkpoints.
        results: Globs of the files that are compared at the end.
        checkpoints: Globs of the checkpoints' files, if the user named them.
    """
    temporaries = _temporaries(reference)
    versions: dict[str, list[Version]] = defaultdict(list)
    paths: dict[int, str] = {}
    for version in reference.versions:
        place = next((path for _, _, path in version.places if naming.parse(path).kind not in temporaries), None)
        if place is not None:
            versions[naming.parse(place).kind].append(version)
            paths[version.number] = place
    read = _read_back(later, temporaries)
    roles = _roles(reference, versions, paths, read, results, checkpoints)
    candidates = {kind: versions[kind] for kind, (role, _) in roles.items() if role in (CHECKPOINT, OTHER)}
    if checkpoints and any(role == CHECKPOINT for role, _ in roles.values()):
        candidates = {kind: versions[kind] for kind, (role, _) in roles.items() if role == CHECKPOINT}
    families = form(candidates, paths, read, _span(reference), slots.find(fixed(candidates, paths), later))
    believed = [one for one in families if _is_believed(one, roles)]
    if not believed:
        # What a run writes piece by piece, under names like those of logs too.
        candidates |= {kind: found for kind, found in versions.items() if roles[kind] == (LOG, NAMED)}
        families = form(candidates, paths, read, _span(reference))
        restarts = [written for written in later if written.number > 1]
        believed = [one for one in families if one.saves > 1 and (not restarts or _is_passed_over(one, restarts))]
    family = max(_without_data(believed, versions), key=lambda one: _rank(one, roles, versions), default=None)
    members = set(family.kinds) if family else set()
    kinds = []
    for kind, found in versions.items():
        role, why = roles[kind]
        if kind in members:
            named = naming.looks_like_checkpoint(kind)
            guess = "it is named like a checkpoint" if named else "it is written as a checkpoint is"
            role, why = CHECKPOINT, why if role == CHECKPOINT else guess
        elif role == CHECKPOINT:
            role, why = OTHER, f"{why}, but it is no part of the checkpoint"
        size = max(version.size for version in found)
        kinds.append(Kind(kind, role, why, len(found), size, paths[found[-1].number]))
    for kind, example in sorted(_kept_as(members, versions).items()):
        if kind not in roles:
            kinds.append(Kind(kind, CHECKPOINT, "an older checkpoint is renamed to it", 0, 0, example))
    for kind in sorted(temporaries):
        example = next(
            path for version in reference.versions for *_, path in version.places if naming.parse(path).kind == kind
        )
        kinds.append(Kind(kind, SCRATCH, "it is renamed into its place", 0, 0, example))
    order = (CHECKPOINT, RESULT, LOG, SETTINGS, OTHER, SCRATCH)
    kinds.sort(key=lambda kind: (order.index(kind.role), kind.pattern))
    last = next((one for one in families if family and _is_last(one, family, versions)), None)
    return Files(tuple(kinds), family, temporaries, _trust(family, roles), last)


def _kept_as(members: set[str], versions: dict[str, list[Version]]) -> dict[str, str]:
    """The kinds that checkpoints are renamed to when a newer one takes their place; of each, one path."""
    found = {}
    for kind in members:
        for version in versions[kind]:
            visited = [path for _, _, path in version.places]
            first = next(place for place, path in enumerate(visited) if naming.parse(path).kind == kind)
            found.update({naming.parse(path).kind: path for path in visited[first + 1 :]})
    return {kind: path for kind, path in found.items() if kind not in members}


def _span(written: Written) -> float:
    """Seconds that an attempt took."""
    return written.ended_s - written.began_s


def _temporaries(reference: Written) -> dict[str, str]:
    """Kinds of which every file was renamed into another kind, and that kind."""
    moved: dict[str, list[str]] = defaultdict(list)
    for version in reference.versions:
        visited = [naming.parse(path).kind for _, _, path in version.places]
        for kind, after in zip(visited, [*visited[1:], ""], strict=True):
            moved[kind].append(after if after != kind else "")
    return {kind: after[0] for kind, after in moved.items() if all(after)}


def _read_back(later: Sequence[Written], temporaries: dict[str, str]) -> dict[str, int]:
    """The kinds that attempts read of what earlier ones had written; of each, the first attempt that did.

    What is read after the attempt wrote a file of that kind itself does not count: a copy, or a check.
    """
    found: dict[str, int] = {}
    for written in later:
        begun: dict[str, int] = {}
        for version in written.versions:
            for _, _, path in version.places:
                begun.setdefault(naming.parse(path).kind, version.begun)
        for reading in written.readings:
            before = [path for *_, path in reading.version.places if naming.parse(path).kind not in temporaries]
            kind = naming.parse(before[0] if before else reading.version.path).kind
            if reading.first < begun.get(kind, reading.first + 1):
                found.setdefault(kind, written.number)
    return found


# -- roles -----------------------------------------------------------------------------------------------------------


def _roles(
    reference: Written,
    versions: dict[str, list[Version]],
    paths: dict[int, str],
    read: dict[str, int],
    results: Sequence[str],
    checkpoints: Sequence[str],
) -> dict[str, tuple[str, str]]:
    """Each kind's role and the reason for it."""
    start = reference.began_s
    roles: dict[str, tuple[str, str]] = {}
    for kind, found in versions.items():
        sample = paths[found[-1].number]
        if any(naming.matches(paths[one.number], checkpoints) for one in found):
            roles[kind] = CHECKPOINT, TOLD
        elif _is_log(kind, found, sample, _span(reference)):
            roles[kind] = LOG, "it is appended to" if any(one.appended for one in found) else NAMED
        elif naming.matches(sample, results) and len(found) == 1 and kind not in read:
            roles[kind] = RESULT, "it is compared at the end"
    rest = {kind: found for kind, found in versions.items() if kind not in roles}
    again = min((found[0].begun for found in rest.values() if _recurs(found, paths)), default=None)
    for kind, found in rest.items():
        first = found[0]
        if again is None:
            early = first.begun_s - start < 0.5 * _span(reference) and not naming.looks_like_checkpoint(first.path)
        else:
            early = first.begun < again
        if not _recurs(found, paths) and early:
            roles[kind] = SETTINGS, "it is written once, at the start"
        elif all(one.gone and one.gone[2] == "unlink" for one in found) and not _is_wanted(kind, read):
            roles[kind] = SCRATCH, "it is deleted again"
        elif kind in read:
            roles[kind] = CHECKPOINT, f"attempt {read[kind]} read it at its start"
        else:
            many = "once" if len(found) == 1 else f"{len(found)} times"
            roles[kind] = OTHER, f"it is written {many}, and nothing has read it"
    return roles


def _is_wanted(kind: str, read: dict[str, int]) -> bool:
    return kind in read or naming.looks_like_checkpoint(kind)


def _recurs(found: list[Version], paths: dict[int, str]) -> bool:
    """True if files of a kind are written again and again: at the same path, or with a number that grows."""
    names = [naming.parse(paths[version.number]) for version in found]
    places = naming.label_places(names)
    labels = {naming.at(name.numbers, places) for name in names}
    return len(labels) > 1 or len({name.path for name in names}) < len(names)


def _is_log(kind: str, found: list[Version], sample: str, span_s: float) -> bool:
    if naming.looks_like_log(sample) or any(version.appended for version in found):
        return True
    if len(found) > 1 or naming.looks_like_checkpoint(kind):
        return False
    one = found[0]
    open_s = (one.closed_s if one.closed is not None else one.begun_s + span_s) - one.begun_s
    return (
        one.writes >= 3
        and one.size < one.writes * _STREAM_WRITE
        and open_s >= max(_STREAM_S, 0.5 * span_s)
        and not one.in_place
    )


# -- the checkpoints among the families --------------------------------------------------------------------------------


def _trust(family: Family | None, roles: dict[str, tuple[str, str]]) -> str:
    if family is None:
        return ""
    if any(roles[kind] == (CHECKPOINT, TOLD) for kind in family.kinds):
        return "told"
    if family.read:
        return "read"
    return "named" if _is_believed(family, roles) else "guessed"


def _is_believed(family: Family, roles: dict[str, tuple[str, str]]) -> bool:
    """True if a family may be the checkpoints: something says so, or a name does."""
    return any(roles[kind][0] == CHECKPOINT or naming.looks_like_checkpoint(kind) for kind in family.kinds)


def _is_passed_over(family: Family, restarts: Sequence[Written]) -> bool:
    """True if a restart left the files that were there as they were, and wrote those that an undisturbed run has next.

    So does what skips the pieces whose files are there. It reads none of them.
    """
    for written in restarts:
        there = {family.label_of(path) for path, version in written.there.items() if version.number not in written.cut}
        own = {family.label_of(version.path) for version in written.versions}
        there, own = there - {None}, own - {None}
        if there and own and not there & own:
            return True
    return False


def _is_last(one: Family, best: Family, versions: dict[str, list[Version]]) -> bool:
    """True if checkpoints are those of every save, where others are the best ones and are read."""
    if not best.read or not any(naming.is_best(kind) for kind in best.kinds):
        return False
    if not all(naming.looks_like_checkpoint(kind) and not naming.is_best(kind) for kind in one.kinds):
        return False
    sizes = [max(version.size for kind in family.kinds for version in versions[kind]) for family in (one, best)]
    return one.saves > best.saves and not one.read and min(sizes) * 2 >= max(sizes)


def _without_data(families: list[Family], versions: dict[str, list[Version]]) -> list[Family]:
    """Leave out what was over before another family began: data that is prepared at the start."""
    times = [
        (min(versions[kind][0].begun for kind in one.kinds), max(versions[kind][-1].begun for kind in one.kinds))
        for one in families
    ]
    last = max((first for one, (first, _) in zip(families, times, strict=True) if one.saves > 1), default=0)
    return [one for one, (_, end) in zip(families, times, strict=True) if end >= last]


def _rank(
    family: Family, roles: dict[str, tuple[str, str]], versions: dict[str, list[Version]]
) -> tuple[bool, bool, bool, int, bool, int]:
    called = any(naming.is_called_checkpoint(kind) for kind in family.kinds)
    named = any(naming.looks_like_checkpoint(kind) for kind in family.kinds)
    known = any(roles[kind][0] == CHECKPOINT for kind in family.kinds)
    size = sum(max(version.size for version in versions[kind]) for kind in family.kinds)
    # Of files that nothing tells more about, the largest.
    last = not any(naming.is_best(kind) for kind in family.kinds)
    return known, named, called, family.saves if known or named else 0, last, size
