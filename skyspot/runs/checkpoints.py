"""The checkpoints in a run's folder, from a listing: manifests are read, sizes are compared, nothing is hashed.

A checkpoint is committed if its manifest can be read, or if its attempt recorded the save as committed. An interrupted
save is not committed; that is no damage, a resume skips it. A recorded checkpoint without a manifest is damaged,
unless two newer ones are committed: then pruning has removed its manifest first.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from skyspot.runs import workers
from skyspot.runs.listing import read_listed, sizes_below
from skyspot.runs.location import reading
from skyspot.runs.workers import in_order
from trainer.layout.documents import LayoutError, LayoutVersionError, from_json
from trainer.layout.events import parse_event
from trainer.layout.identity import id_among, is_of, known_id, missing_facts
from trainer.layout.manifest import Manifest, read_manifest, sizes_agree
from trainer.layout.names import FINAL, MANIFEST, CheckpointName, RunPaths, list_checkpoints

PRUNED_BEHIND = 2
READERS = 8
"""Threads that read manifests and events."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that a save or the export wrote."""

    name: str
    """The folder's name; `final` for the exported model."""
    step: int | None
    attempt: str | None
    bytes: int
    """Size of the files in the manifest; without a manifest, of the files in the folder."""
    committed: bool
    whole: bool | None
    """True only after every file was hashed; None if unknown."""
    problem: str | None
    """The problem, as a sentence."""
    saved_at: float | None = None
    """When it was committed, in unix seconds."""
    saved_by: str | None = None
    """The source of `saved_at`: `event`, the attempt's record; `mtime`, the manifest's own, which a copy changes."""
    manifest: Manifest | None = None
    """None if it cannot be read."""

    @property
    def damaged(self) -> bool:
        """True if it is committed and known not to be whole."""
        return self.committed and self.whole is False

    @property
    def finite(self) -> bool:
        """True if its weights are free of NaN and infinite values, according to its manifest."""
        return self.manifest is None or self.manifest.finite

    @property
    def resumable(self) -> bool:
        """True if a resume takes it if it is whole; it must be finite, except in a run with --on-nan ignore."""
        config = self.manifest.facts.get("config") if self.manifest else None
        return self.finite or (isinstance(config, Mapping) and config.get("on_nan") == "ignore")


def list_all(paths: RunPaths, on_progress: Callable[[int, int], None] = lambda _done, _of: None) -> list[Checkpoint]:
    """All checkpoints, newest first, and `final/` last.

    Args:
        paths: The run's folder, local or in a bucket.
        on_progress: Gets the number of folders that have been read, and of all folders.

    Raises:
        UnreadableError: the folder cannot be read from this machine.
    """
    # The worker process cannot report progress.
    return workers.call(paths.root, _list_all, paths, *(() if workers.is_isolated(paths.root) else (on_progress,)))


def _list_all(paths: RunPaths, on_progress: Callable[[int, int], None] = lambda _done, _of: None) -> list[Checkpoint]:
    with reading(paths):
        names = list_checkpoints(paths)
        sizes = _by_folder(sizes_below(paths.checkpoints)) if names else {}
        final = sizes_below(paths.final)
        work = [partial(_read, paths.checkpoint(name), name, sizes.get(str(name), {})) for name in names]
        if final:
            work.append(partial(_read, paths.final, None, final))
        found = []
        with closing(in_order(work, READERS)) as results:
            for one in results:
                found.append(one)
                on_progress(len(found), len(work))
        with_manifest = {name for name, files in sizes.items() if MANIFEST in files}
        recorded = _recorded(found, _records(paths, names), with_manifest)
        return [_with_time(paths, one) for one in _of_this_run(paths, list(recorded))]


def _of_this_run(paths: RunPaths, found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints; those of another run are marked, because a resume skips them."""
    there = [(name, one.manifest) for one in found if one.manifest and (name := CheckpointName.parse(one.name))]
    run_id = id_among(known_id(paths)[0], there)
    return [one if one.name == FINAL else _marked_if_of_another(one, run_id) for one in found]


def _marked_if_of_another(one: Checkpoint, run_id: str | None) -> Checkpoint:
    if one.manifest is None or is_of(one.manifest, run_id):
        return one
    return replace(
        one, whole=False, problem=f"another run's checkpoint ({one.manifest.facts['run_id']})", manifest=None
    )


def _by_folder(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        folder, _, name = path.partition("/")
        found.setdefault(folder, {})[name] = size
    return found


def _read(folder: Path, name: CheckpointName | None, sizes: Mapping[str, int]) -> Checkpoint:
    """A checkpoint, or the export if `name` is None; `sizes` are the sizes of the folder's files."""
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
        manifest = read_manifest(folder, lambda path: read_listed(path, sizes.get(MANIFEST, 0)))
    except LayoutVersionError as error:
        return replace(one, committed=True, whole=None, problem=str(error).removeprefix(f"{folder / MANIFEST}: "))
    except LayoutError as error:
        return replace(one, problem=str(error))
    except OSError as error:
        if not concerns_one_file(folder, error):
            raise
        return replace(one, committed=True, whole=None, problem=f"{MANIFEST}: {error.strerror or error}")
    if name is None:
        with suppress(LayoutError):
            one = replace(one, step=manifest.step)

    def size_of(file: str) -> int:
        if file not in sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return sizes[file]

    problem, whole = missing_facts(one.name, manifest), None
    try:
        problem = problem or sizes_agree(folder, manifest, None if isinstance(folder, Path) else size_of)
        whole = False if problem else None
    except OSError as error:
        problem = f"its files cannot be read: {error.strerror or error}"
    return replace(one, bytes=manifest.total_bytes, committed=True, whole=whole, problem=problem, manifest=manifest)


def concerns_one_file(folder: Path, error: OSError) -> bool:
    """True if an error concerns one file; a bucket's errors mostly concern the whole bucket."""
    return isinstance(folder, Path) or isinstance(error, PermissionError)


def _records(paths: RunPaths, names: Sequence[CheckpointName]) -> dict[str, float | None]:
    """The checkpoints that their attempts recorded as committed, with the time: unix seconds by the node's clock."""
    wanted: dict[str, set[str]] = {}
    for name in names:
        wanted.setdefault(str(name.attempt), set()).add(str(name))
    files = _by_folder(sizes_below(paths.attempts)) if wanted else {}
    work = [partial(_records_of, paths.attempts / one, files.get(one, {}), wanted[one]) for one in wanted]
    found: dict[str, float | None] = {}
    with closing(in_order(work, READERS)) as parts:
        for part in parts:
            found.update(part)
    return found


def _records_of(folder: Path, files: Mapping[str, int], wanted: set[str]) -> dict[str, float | None]:
    """The records of one attempt. Records outlive pruned checkpoints, so only the newest are read, as far as needed."""
    saved = sorted((event for event in map(_saved_event, files) if event), reverse=True)
    work = [partial(_read_event, folder / file, files[file]) for _, file in saved]
    found: dict[str, float | None] = {}
    with closing(in_order(work, READERS // 2)) as events:
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
    """An event's fields; empty if the event is torn."""
    with suppress(LayoutError, OSError):
        fields = from_json(read_listed(path, size), allows_nan=True)
        return fields if isinstance(fields, dict) else {}
    return {}


def _recorded(
    found: Sequence[Checkpoint], records: Mapping[str, float | None], with_manifest: set[str]
) -> Iterator[Checkpoint]:
    """The checkpoints with their records: the time, and that a checkpoint without a manifest was committed."""
    committed = 0
    for one in found:
        pruned = one.name not in with_manifest and committed >= PRUNED_BEHIND
        if one.name in records and not one.committed and not pruned:
            why = f"{MANIFEST} is missing" if one.name not in with_manifest else str(one.problem).partition(": ")[2]
            one = replace(one, committed=True, problem=f"{why}; its attempt recorded this checkpoint as committed")
        committed += one.committed
        at = records.get(one.name)
        yield replace(one, saved_at=at, saved_by="event") if at is not None else one


def _with_time(paths: RunPaths, one: Checkpoint) -> Checkpoint:
    """The checkpoint with its manifest's modification time, if it has no recorded time."""
    if one.saved_at is None and one.manifest is not None:
        with suppress(OSError):
            at = (folder_of(paths, one) / MANIFEST).stat().st_mtime
            return replace(one, saved_at=at, saved_by="mtime") if at else one
    return one


def folder_of(paths: RunPaths, one: Checkpoint) -> Path:
    """The folder of a checkpoint or of the export."""
    return paths.final if one.name == FINAL else paths.checkpoints / one.name
