"""The saves of an attempt: which files make one checkpoint together, when it was complete, and what is left of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from skyspot.rehearsal import appended, naming
from skyspot.rehearsal.families import Family
from skyspot.rehearsal.files import Files, learn
from skyspot.rehearsal.replay import Attempt, Bucket, Version, Written
from skyspot.rehearsal.slots import alike


@dataclass(frozen=True)
class SavedFile:
    """One file of a save."""

    path: str
    """Where it was put for good, or would have been."""
    begun: int
    """Number of the first call that made it."""
    finished: int | None
    """Number of the call that left it whole at its path: its close, or a rename. None: it is not."""
    begun_s: float
    """Time of that call, on the monotonic clock."""
    finished_s: float
    size: int
    """Bytes."""
    in_place: bool
    """Written over an older content that was not cut to nothing first."""
    version: int
    """Its number in the replay."""

    @property
    def kind(self) -> str:
        """Its pattern."""
        return naming.parse(self.path).kind


@dataclass(frozen=True)
class Save:
    """One checkpoint: a group of files that were written together."""

    index: int
    """1, 2, ...: the how-manieth of the run, counted on from the save that the attempt resumed from."""
    numbers: tuple[int, ...]
    """The numbers in its files' names that tell it; empty if none does."""
    label: str
    """`step 10`, `epoch 3`, or `save 2` if its files' names tell nothing."""
    step: int | None
    """The step, if its files' names tell it."""
    attempt: int
    """The attempt that made it, from 1."""
    files: tuple[SavedFile, ...]
    """In the order in which they were begun."""
    missing: tuple[str, ...]
    """Kinds of files that the undisturbed run's save has beside these."""
    complete: int | None
    """Number of the call after which every file was whole and in its place; None: it never was."""

    @property
    def begun(self) -> int:
        """Number of its first call."""
        return self.files[0].begun

    @property
    def begun_s(self) -> float:
        """Time of that call, on the monotonic clock."""
        return self.files[0].begun_s

    @property
    def complete_s(self) -> float | None:
        """Time at which it was complete, on the monotonic clock."""
        return max(file.finished_s for file in self.files) if self.complete is not None else None

    @property
    def last_s(self) -> float:
        """Time of its last call, on the monotonic clock."""
        return max(file.begun_s if file.finished is None else file.finished_s for file in self.files)

    @property
    def largest(self) -> str:
        """Path of its largest file, to name it by."""
        return max(self.files, key=lambda file: file.size).path


@dataclass(frozen=True)
class State:
    """What lay in the bucket at one time."""

    complete: tuple[Save, ...]
    """The saves that were complete and still there, oldest first."""
    incomplete: tuple[Save, ...]
    """Those that were begun and never complete, and of which a file is there."""
    open_files: tuple[str, ...]
    """The checkpoint's files that were being written and held something, by their last paths, newest first."""
    destroyed: Save | None
    """The newest save that had been complete, if none is left: another was being written over it, or it was deleted."""
    partly: bool = False
    """True if a file of an incomplete save lies under the name that a restart looks for."""

    @property
    def newest(self) -> Save | None:
        """The newest complete save."""
        return self.complete[-1] if self.complete else None


@dataclass(frozen=True)
class Learnt:
    """What the undisturbed run taught, and the attempts so far."""

    files: Files
    saves: tuple[Save, ...]
    """Those of the undisturbed run."""
    began_s: float
    """When it started, on the monotonic clock."""
    logged: int
    """Bytes that it wrote to its logs."""
    only_at_the_end: bool
    """True if its only save came at its end, so that a preemption loses everything."""
    journal: str = ""
    """Without checkpoints: the path of the file that it appends its work to, and reads at each start to go on."""
    journal_size: int = 0
    """Bytes of that file at the undisturbed run's end."""
    bests: Mapping[int, str] = field(default_factory=dict)
    """The files of the best so far that are no part of the checkpoint, by the index of the save they came with."""

    @property
    def irregular(self) -> bool:
        """True if its saves come at irregular steps or times, as on a new best."""
        return _is_irregular(self.saves)


def study(
    reference: Attempt,
    legs: Sequence[Sequence[Attempt]] = (),
    results: Sequence[str] = (),
    checkpoints: Sequence[str] = (),
) -> Learnt:
    """Learn a run's checkpoints from its undisturbed run, and from what restarts read.

    Args:
        reference: The undisturbed run.
        legs: The attempts so far, by leg; the more, the surer.
        results: Globs of the files that are compared at the end.
        checkpoints: Globs of the checkpoints' files, if the user named them.
    """
    later = []
    for leg in legs:
        bucket = Bucket()
        later += [bucket.replay(attempt) for attempt in leg]
    return study_replayed(Bucket().replay(reference), later, results, checkpoints)


def study_replayed(
    reference: Written, later: Sequence[Written], results: Sequence[str], checkpoints: Sequence[str]
) -> Learnt:
    """Learn a run's checkpoints from what was replayed already: as `study`."""
    files = learn(reference, later, results, checkpoints)
    saves = tuple(group(files, reference, ()))
    at_the_end = _comes_at_the_end(saves, reference)
    ours = files.family is not None and (files.family.read or not at_the_end)
    journal = "" if ours else appended.find(reference, later, results)
    size = reference.left[journal].size if journal else 0
    logs, best = files.logged(reference.calls), bests(files, reference, saves)
    return Learnt(files, saves, reference.began_s, logs, at_the_end, journal, size, best)


def bests(files: Files, written: Written, saves: Sequence[Save]) -> dict[int, str]:
    """The files of the best so far that are no part of the checkpoint, by the index of the nearest save."""
    found: dict[int, str] = {}
    for version in written.versions:
        path = files.home(version)
        if naming.is_best(path) and not (files.family and files.kind_of(version) in files.family.kinds):
            near = min(saves, key=lambda save: abs(save.begun_s - version.begun_s), default=None)
            if near is not None:
                found.setdefault(near.index, path)
    return found


# -- grouping --------------------------------------------------------------------------------------------------------


def group(files: Files, written: Written, reference: Sequence[Save], base: int = 0) -> list[Save]:
    """The saves that one attempt made, in the order in which they were begun.

    Args:
        files: What was learnt of the run's files.
        written: The attempt.
        reference: The undisturbed run's saves, which tell what makes one complete; empty for that run itself.
        base: Index of the save that the attempt resumed from.
    """
    family = files.family
    if family is None:
        return []
    found = [_saved(files, version) for version in written.versions]
    bundles = _bundles(family, [file for file in found if file.kind in family.kinds])
    usual = max((len(save.files) for save in reference), default=0)
    for file in found:
        # Under a temporary name that does not tell which file it would have become.
        if file.finished is None and files.becomes(file.kind) in family.kinds:
            if bundles and len(bundles[-1]) < usual and bundles[-1][0].begun < file.begun:
                bundles[-1].append(file)
            else:
                bundles.append([file])
    saves = [_save(family, bundle, written.number, base + order) for order, bundle in enumerate(bundles, start=1)]
    saves = [_judged(family, save, reference) for save in _renumbered(saves, reference)]
    # A save that a later one of the same attempt follows was as complete as it was meant to be.
    last = max((order for order, save in enumerate(saves) if save.complete is not None), default=-1)
    return [_as_it_is(save) if order < last and reference else save for order, save in enumerate(saves)]


def _saved(files: Files, version: Version) -> SavedFile:
    place = files.place(version)
    finished, finished_s = version.closed, version.closed_s
    if place is None or version.cut:
        finished = None
    elif finished is not None and place[0] > finished:
        finished, finished_s = place[0], place[1]
    return SavedFile(
        files.home(version),
        version.begun,
        finished,
        version.begun_s,
        finished_s,
        version.size,
        version.in_place,
        version.number,
    )


def _bundles(family: Family, members: list[SavedFile]) -> list[list[SavedFile]]:
    """The files of each save."""
    bundles: list[list[SavedFile]] = []
    newest: dict[tuple[int, ...], list[SavedFile]] = {}
    rest = []
    for file in members:
        label = family.label_of(file.path)
        if label is None and (family.places or file.path not in family.anchors):
            rest.append(file)
            continue
        bundle = newest.get(label or ())
        if bundle is None or _has(family, bundle, file):
            bundle = newest[label or ()] = []
            bundles.append(bundle)
        bundle.append(file)
    bundles.sort(key=lambda bundle: bundle[0].begun)
    anchors = [bundle[0].begun for bundle in bundles]
    for file in rest:
        _attach(file, bundles, anchors, family.before)
    for bundle in bundles:
        bundle.sort(key=lambda file: file.begun)
    return bundles


def _has(family: Family, bundle: list[SavedFile], file: SavedFile) -> bool:
    """True if a save's files include this one, or the one in its place in another slot."""
    return any(other.path in alike(family.slots, file.path) for other in bundle)


def _attach(file: SavedFile, bundles: list[list[SavedFile]], anchors: list[int], before: frozenset[str]) -> None:
    """Put a file whose name tells no save into the one that it was written with."""
    place = sum(anchor <= file.begun for anchor in anchors) - 1
    place += place < 0 or file.kind in before
    while place < len(bundles) and any(other.path == file.path for other in bundles[place]):
        place += 1
    if place < len(bundles):
        bundles[place].append(file)
    else:
        bundles.append([file])


def _save(family: Family, files: list[SavedFile], attempt: int, index: int) -> Save:
    numbers: tuple[int, ...] = ()
    label, step = f"save {index}", None
    for file in files:
        name = naming.parse(file.path)
        places = family.places.get(name.kind)
        if places:
            numbers, label = naming.at(name.numbers, places), naming.label(name, places)
            step = naming.step(name, places)
            break
    complete = max((-1 if file.finished is None else file.finished for file in files), default=-1)
    whole = all(file.finished is not None for file in files)
    return Save(index, numbers, label, step, attempt, tuple(files), (), complete if whole else None)


def _renumbered(saves: list[Save], reference: Sequence[Save]) -> list[Save]:
    """The saves with the index that the undisturbed run's save of the same number has."""
    known = {save.numbers: save.index for save in reference if save.numbers}
    found, last = [], saves[0].index - 1 if saves else 0
    for save in saves:
        index = known.get(save.numbers, last + 1 if save.numbers and known else save.index)
        last = index
        found.append(replace(save, index=index))
    return found


def _judged(family: Family, save: Save, reference: Sequence[Save]) -> Save:
    """The save, complete only if it has every file that the undisturbed run's has."""
    if not reference:
        return save
    same = next(
        (one for one in reference if (one.numbers == save.numbers if save.numbers else one.index == save.index)), None
    )
    if same is not None:
        wanted = Counter(family.kind_like(file.path) for file in same.files)
    else:
        wanted = Counter()
        sets = Counter(tuple(sorted(family.kind_like(file.path) for file in one.files)) for one in reference)
        wanted.update(sets.most_common(1)[0][0])
    missing = tuple(sorted((wanted - Counter(family.kind_like(file.path) for file in save.files)).elements()))
    return replace(save, missing=missing, complete=None if missing else save.complete)


def _as_it_is(save: Save) -> Save:
    finished = [file.finished for file in save.files if file.finished is not None]
    whole = len(finished) == len(save.files)
    return replace(save, complete=max(finished)) if whole and save.complete is None else save


# -- the bucket at one time ------------------------------------------------------------------------------------------


def state(files: Files, saves: Sequence[Save], there: Mapping[str, Version], cut: frozenset[int]) -> State:
    """What lay in the bucket of a leg when an attempt began.

    Args:
        files: What was learnt of the run's files.
        saves: All saves of the attempts before, oldest first.
        there: The files that lay there.
        cut: Numbers of the versions that are not whole.
    """
    begun = {version.number for version in there.values()}
    # A file that is renamed into its place is not there before: not under the name that a reader looks for.
    # A copy stands for what it was made of.
    whole = {
        version.number: version
        for path, version in there.items()
        if naming.parse(path).kind not in files.temporaries and version.number not in cut
    }
    present = set(whole) | {files.original(version).number for version in whole.values()}
    complete, incomplete, lost = [], [], None
    for save in saves:
        body = _body(files, save)
        if save.complete is not None and all(file.version in present for file in body):
            complete.append(save)
        elif save.complete is None and any(file.version in begun for file in save.files):
            incomplete.append(save)
        elif save.complete is not None:
            lost = save
    family = files.family
    opened = [
        (version.number, path)
        for path, version in there.items()
        if version.number in cut and version.size and family and files.kind_of(version) in family.kinds
    ]
    opened.sort(reverse=True)
    placed = {version.number for path, version in there.items() if naming.parse(path).kind not in files.temporaries}
    partly = any(file.version in placed for save in incomplete for file in save.files)
    destroyed = lost if not complete else None
    return State(tuple(complete), tuple(incomplete), tuple(path for _, path in opened), destroyed, partly)


def _body(files: Files, save: Save) -> list[SavedFile]:
    """The files of a save without which it cannot be resumed from.

    A file without a number beside files with one is replaced by every save (`latest`), and the save is there still.
    """
    family = files.family
    assert family
    if family.places:
        return [file for file in save.files if family.label_of(file.path) is not None]
    # What no restart reads is not needed, as an optimizer's file that is forgotten.
    read = [file for file in save.files if file.kind in family.read - family.copies]
    return read or [file for file in save.files if file.path in family.anchors] or list(save.files)


# -- when a run saves ------------------------------------------------------------------------------------------------


def _comes_at_the_end(saves: Sequence[Save], written: Written) -> bool:
    """True if the only save begins in the last tenth of the run's time."""
    return len(saves) == 1 and written.ended_s - saves[0].begun_s <= 0.1 * (written.ended_s - written.began_s)


def _is_irregular(saves: Sequence[Save]) -> bool:
    if any(naming.is_best(file.path) for save in saves[:1] for file in save.files):
        return True
    if len(saves) < 4:
        return False
    if all(save.numbers for save in saves):
        counts = [save.step if save.step is not None else save.numbers[-1] for save in saves]
        gaps: list[float] = [after - before for before, after in pairwise(counts)]
        return len(set(gaps[:-1])) > 1  # The last save may come at the run's end.
    gaps = [after.begun_s - before.begun_s for before, after in pairwise(saves)][:-1]
    return max(gaps) > 4 * max(sorted(gaps)[len(gaps) // 2], 1e-9)
