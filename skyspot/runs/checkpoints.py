"""A run's checkpoints as its folder holds them: looked at in a listing, or read and hashed again.

Committed: the manifest can be read, or the attempt recorded the save as committed. What a preemption left of a save is
neither; that is no damage, a resume passes it by. One that was recorded and has lost its manifest is damaged, unless
two newer ones are committed: then pruning took it, manifest first.
"""

from __future__ import annotations

import errno
import os
import queue
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from skyspot.runs import aside, location
from trainer.layout.documents import LayoutError, LayoutVersionError, from_json
from trainer.layout.events import parse_event
from trainer.layout.identity import belongs, id_among, is_of, known_id
from trainer.layout.manifest import FileRecord, Manifest, read_manifest, sizes_agree
from trainer.layout.names import MANIFEST, STATE, CheckpointName, RunPaths, list_checkpoints

FINAL = "final"
PRUNED_BEHIND = 2
READERS = 4
"""Files that are hashed at once; each holds one or two pieces of 8 MB."""
LOOKERS = 8
SAID = 3
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that a save, or the export, made."""

    name: str
    """The folder's name; `final` of the exported model."""
    step: int | None
    attempt: str | None
    bytes: int
    """Size of the files that its manifest lists; of those that are there where it has none."""
    committed: bool
    whole: bool | None
    """True only after every file was hashed; None: not known."""
    problem: str | None
    """What is wrong with it, as a sentence."""
    saved_at: float | None = None
    """When it was committed, unix seconds."""
    saved_by: str | None = None
    """Whose clock says that: `event`, the attempt's record; `mtime`, the manifest's own time, which a copy changes."""
    manifest: Manifest | None = None
    """None where it cannot be read."""

    @property
    def damaged(self) -> bool:
        """Whether it was committed and is known not to be whole."""
        return self.committed and self.whole is False

    @property
    def finite(self) -> bool:
        """Whether its weights are free of NaN and infinite values, as far as its manifest says."""
        return self.manifest is None or self.manifest.finite

    @property
    def resumable(self) -> bool:
        """Whether a resume takes it where it is whole: one that is not finite only in a run with --on-nan ignore."""
        config = self.manifest.facts.get("config") if self.manifest else None
        return self.finite or (isinstance(config, Mapping) and config.get("on_nan") == "ignore")


# -- look ------------------------------------------------------------------------------------------------------------


def look(paths: RunPaths, told: Callable[[int, int], None] = lambda _done, _of: None) -> list[Checkpoint]:
    """What is there, newest first, `final/` last: manifests are read, sizes compared, nothing is hashed.

    Args:
        paths: The run's folder, local or a bucket's.
        told: Hears how many of how many folders have been looked at.

    Raises:
        UnreadableError: the folder cannot be read from here.
    """
    # A child process cannot tell us of each.
    return aside.call(paths.root, _look, paths, *(() if aside.is_apart(paths.root) else (told,)))


def _look(paths: RunPaths, told: Callable[[int, int], None] = lambda _done, _of: None) -> list[Checkpoint]:
    with location.reading(paths):
        names = list_checkpoints(paths)
        sizes = _by_folder(location.sizes_below(paths.checkpoints)) if names else {}
        final = location.sizes_below(paths.final)
        work = [partial(_look_at, paths.checkpoint(name), name, sizes.get(str(name), {})) for name in names]
        if final:
            work.append(partial(_look_at, paths.final, None, final))
        found = []
        with closing(_in_order(work, LOOKERS)) as looked:
            for one in looked:
                found.append(one)
                told(len(found), len(work))
        with_manifest = {name for name, files in sizes.items() if MANIFEST in files}
        recorded = _recorded(found, _records(paths, names), with_manifest)
        return [_timed(paths, one) for one in _of_this_run(paths, list(recorded))]


def _of_this_run(paths: RunPaths, found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints; those of another run as such: a resume passes them by."""
    there = [(name, one.manifest) for one in found if one.manifest and (name := CheckpointName.parse(one.name))]
    run_id = id_among(known_id(paths)[0], there)
    return [
        one
        if one.manifest is None or one.name == FINAL or is_of(one.manifest, run_id)
        else replace(one, whole=False, problem=f"it is another run's ({one.manifest.facts['run_id']})", manifest=None)
        for one in found
    ]


def _by_folder(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        folder, _, name = path.partition("/")
        found.setdefault(folder, {})[name] = size
    return found


def _look_at(folder: Path, name: CheckpointName | None, sizes: Mapping[str, int]) -> Checkpoint:
    """A checkpoint, or the export where `name` is None; `sizes` are those of the folder's files."""
    one = Checkpoint(
        name=str(name) if name else FINAL,
        step=name.step if name else None,
        attempt=str(name.attempt) if name else None,
        bytes=sum(sizes.values()),
        committed=False,
        whole=False,
        problem=None,
    )
    try:
        manifest = read_manifest(folder, lambda path: location.read_listed(path, sizes.get(MANIFEST, 0)))
    except LayoutVersionError as error:
        return replace(one, committed=True, whole=None, problem=str(error).removeprefix(f"{folder / MANIFEST}: "))
    except LayoutError as error:
        return replace(one, problem=str(error))
    except OSError as error:
        if not _is_of_the_file(folder, error):
            raise
        return replace(one, committed=True, whole=None, problem=f"{MANIFEST}: {error.strerror or error}")
    if name is None:
        with suppress(LayoutError):
            one = replace(one, step=manifest.step)

    def size_of(file: str) -> int:
        if file not in sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return sizes[file]

    problem, whole = _lacks(one.name, manifest), None
    try:
        problem = problem or sizes_agree(folder, manifest, None if isinstance(folder, Path) else size_of)
        whole = False if problem else None
    except OSError as error:
        problem = f"its files cannot be looked at: {error.strerror or error}"
    return replace(one, bytes=manifest.total_bytes, committed=True, whole=whole, problem=problem, manifest=manifest)


def _is_of_the_file(folder: Path, error: OSError) -> bool:
    """Whether an error is about one file alone; a bucket's mostly is about the bucket."""
    return isinstance(folder, Path) or isinstance(error, PermissionError)


def _lacks(name: str, manifest: Manifest) -> str | None:
    """What a manifest has to say and does not."""
    parsed = CheckpointName.parse(name)
    if parsed and not belongs(manifest, parsed):
        return "its manifest is another checkpoint's"
    if name != FINAL and STATE not in manifest.files:
        return f"its manifest lists no {STATE}"
    return None if manifest.files else "its manifest lists no file"


def _records(paths: RunPaths, names: Sequence[CheckpointName]) -> dict[str, float | None]:
    """Which checkpoints their attempts recorded as committed, and when, unix seconds by the node's clock."""
    wanted: dict[str, set[str]] = {}
    for name in names:
        wanted.setdefault(str(name.attempt), set()).add(str(name))
    files = _by_folder(location.sizes_below(paths.attempts)) if wanted else {}
    work = [partial(_records_of, paths.attempts / one, files.get(one, {}), wanted[one]) for one in wanted]
    found: dict[str, float | None] = {}
    with closing(_in_order(work, LOOKERS)) as parts:
        for part in parts:
            found.update(part)
    return found


def _records_of(folder: Path, files: Mapping[str, int], wanted: set[str]) -> dict[str, float | None]:
    """One attempt's. Records outlive what was pruned: they are read from the newest back, as far as is needed."""
    saved = sorted((event for event in map(_saved_event, files) if event), reverse=True)
    work = [partial(_read_event, folder / file, files[file]) for _, file in saved]
    found: dict[str, float | None] = {}
    with closing(_in_order(work, LOOKERS // 2)) as events:
        for event in events:
            name, at = event.get("checkpoint"), event.get("time")
            if not isinstance(name, str):
                continue
            if name in wanted:
                found[name] = float(at) if isinstance(at, (int, float)) and 1e9 < at < 1e11 else None
            if len(found) == len(wanted) or name < min(wanted):
                break
    return found


def _saved_event(file: str) -> tuple[int, str] | None:
    event = parse_event(file)
    return (event[0], file) if event and event[1] == "saved" else None


def _read_event(path: Path, size: int) -> Mapping[str, Any]:
    """An event's fields; empty where it is torn."""
    with suppress(LayoutError, OSError):
        fields = from_json(location.read_listed(path, size))
        return fields if isinstance(fields, dict) else {}
    return {}


def _recorded(
    found: Sequence[Checkpoint], records: Mapping[str, float | None], with_manifest: set[str]
) -> Iterator[Checkpoint]:
    """The checkpoints with what the attempts recorded: when each was committed, and that one without a manifest was."""
    committed = 0
    for one in found:
        pruned = one.name not in with_manifest and committed >= PRUNED_BEHIND
        if one.name in records and not one.committed and not pruned:
            why = f"{MANIFEST} is missing" if one.name not in with_manifest else str(one.problem).partition(": ")[2]
            one = replace(one, committed=True, problem=f"{why}; its attempt recorded this checkpoint as committed")
        committed += one.committed
        at = records.get(one.name)
        yield replace(one, saved_at=at, saved_by="event") if at is not None else one


def _timed(paths: RunPaths, one: Checkpoint) -> Checkpoint:
    """The checkpoint with its manifest's own time, where there is no better one."""
    if one.saved_at is None and one.manifest is not None:
        with suppress(OSError):
            at = (_folder(paths, one) / MANIFEST).stat().st_mtime
            return replace(one, saved_at=at, saved_by="mtime") if at else one
    return one


def _folder(paths: RunPaths, one: Checkpoint) -> Path:
    return paths.final if one.name == FINAL else paths.checkpoints / one.name


# -- verify ----------------------------------------------------------------------------------------------------------


def verify(
    paths: RunPaths, looked: Sequence[Checkpoint], told: Callable[[int], None] = lambda _count: None
) -> Iterator[Checkpoint]:
    """Each of the checkpoints that `look` gave, in its order, after every file that a manifest lists was hashed.

    Args:
        paths: The run's folder, local or a bucket's.
        looked: What `look` gave.
        told: Hears from several threads how many bytes more are done, of `to_hash` bytes in all.

    Raises:
        UnreadableError: the bucket cannot be read from here.
    """
    files = [
        partial(_file, _folder(paths, one), name, record, told)
        for one in looked
        if one.manifest is not None
        for name, record in one.manifest.files.items()
    ]
    with location.reading(paths), closing(_in_order(files, READERS)) as results:
        for one in looked:
            yield one if one.manifest is None else _judged(paths, one, [next(results) for _ in one.manifest.files])


def to_hash(looked: Sequence[Checkpoint]) -> int:
    """How many bytes `verify` is going to tell of."""
    return sum(one.manifest.total_bytes for one in looked if one.manifest is not None)


@dataclass(frozen=True)
class _Read:
    """What reading a file gave."""

    whole: bool | None
    """None: it cannot be read, which says nothing of it."""
    problem: str | None


def _file(folder: Path, name: str, record: FileRecord, told: Callable[[int], None]) -> _Read:
    if not aside.is_apart(folder):
        return _hashed(folder, name, record, told)
    try:
        return aside.call(folder, _hashed, folder, name, record)
    finally:
        told(record.bytes)


def _hashed(folder: Path, name: str, record: FileRecord, told: Callable[[int], None] = lambda _count: None) -> _Read:
    from trainer.bucket.verify import file_problem

    left = record.bytes

    def count(read: int) -> None:
        nonlocal left
        left -= read
        told(read)

    try:
        problem = file_problem(folder, name, record, count)
        return _Read(problem is None, problem)
    except OSError as error:
        if not _is_of_the_file(folder, error):
            raise
        return _Read(None, f"{name} cannot be read: {error.strerror or error}")
    finally:
        told(left)


def _judged(paths: RunPaths, one: Checkpoint, read: Sequence[_Read]) -> Checkpoint:
    assert one.manifest is not None
    lacks = _lacks(one.name, one.manifest)
    problems = [*([lacks] if lacks else []), *(file.problem for file in read if file.problem)]
    if not problems:
        return replace(one, whole=True, problem=None)
    changed = aside.call(paths.root, _changed, _folder(paths, one), one.manifest)
    if changed:
        return replace(one, committed=False, whole=None, problem=changed)
    more = f"; and {len(problems) - SAID} files more" if len(problems) > SAID else ""
    known = lacks is not None or any(file.whole is False for file in read)
    return replace(one, whole=False if known else None, problem="; ".join(problems[:SAID]) + more)


def _changed(folder: Path, manifest: Manifest) -> str | None:
    """What the run itself did to a folder since its manifest was read; None where that is as it was."""
    try:
        return None if read_manifest(folder) == manifest else "written again while it was read"
    except LayoutError:
        return "pruned, or written again, while it was read"


# -- several at once -------------------------------------------------------------------------------------------------


def _in_order(work: Sequence[Callable[[], _T]], threads: int) -> Generator[_T, None, None]:
    """What each piece of work gives, in their order; several are done at once.

    concurrent.futures' threads are waited for at the end of the process. These are not: Ctrl-C leaves at once, even
    where a bucket hangs.
    """
    todo, done = aside.begun(work, threads)
    ready: dict[int, tuple[Any, BaseException | None]] = {}
    try:
        for number in range(len(work)):
            while number not in ready:
                other, answer = done.get()
                ready[other] = answer
            result, error = ready.pop(number)
            if error is not None:
                raise error
            yield result
    finally:
        with suppress(queue.Empty):
            while True:
                todo.get_nowait()
