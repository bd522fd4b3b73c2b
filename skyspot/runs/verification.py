"""Hash the files of a run's checkpoints and compare them with their manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from skyspot.runs import workers
from skyspot.runs.checkpoints import Checkpoint, concerns_one_file, folder_of
from skyspot.runs.location import reading
from skyspot.runs.workers import in_order
from trainer.layout.documents import LayoutError
from trainer.layout.identity import missing_facts
from trainer.layout.manifest import FileRecord, Manifest, read_manifest
from trainer.layout.names import RunPaths

READERS = 4
"""Files that are hashed at once; each needs one or two pieces of 8 MB."""
MAX_PROBLEMS = 3


def verify(
    paths: RunPaths, found: Sequence[Checkpoint], on_read: Callable[[int], None] = lambda _count: None
) -> Iterator[Checkpoint]:
    """The given checkpoints in their order, each after every file in its manifest was hashed.

    Args:
        paths: The run's folder, local or in a bucket.
        found: The checkpoints from `list_all`.
        on_read: Gets the number of bytes that were read, from several threads; `bytes_to_hash` in all.

    Raises:
        UnreadableError: the bucket cannot be read from this machine.
    """
    files = [
        partial(_hash_file, folder_of(paths, one), name, record, on_read)
        for one in found
        if one.manifest is not None
        for name, record in one.manifest.files.items()
    ]
    with reading(paths), closing(in_order(files, READERS)) as results:
        for one in found:
            yield one if one.manifest is None else _judged(paths, one, [next(results) for _ in one.manifest.files])


def bytes_to_hash(found: Sequence[Checkpoint]) -> int:
    """The number of bytes that `verify` reads."""
    return sum(one.manifest.total_bytes for one in found if one.manifest is not None)


@dataclass(frozen=True)
class _FileResult:
    """The result of reading a file."""

    whole: bool | None
    """None if the file cannot be read, so its state is unknown."""
    problem: str | None


def _hash_file(folder: Path, name: str, record: FileRecord, on_read: Callable[[int], None]) -> _FileResult:
    if not workers.is_isolated(folder):
        return _hashed(folder, name, record, on_read)
    try:
        return workers.call(folder, _hashed, folder, name, record)
    finally:
        on_read(record.bytes)


def _hashed(
    folder: Path, name: str, record: FileRecord, on_read: Callable[[int], None] = lambda _count: None
) -> _FileResult:
    from trainer.bucket.verify import file_problem

    left = record.bytes

    def count(read: int) -> None:
        nonlocal left
        left -= read
        on_read(read)

    try:
        problem = file_problem(folder, name, record, count)
        return _FileResult(problem is None, problem)
    except OSError as error:
        if not concerns_one_file(folder, error):
            raise
        return _FileResult(None, f"{name} cannot be read: {error.strerror or error}")
    finally:
        on_read(left)


def _judged(paths: RunPaths, one: Checkpoint, files: Sequence[_FileResult]) -> Checkpoint:
    assert one.manifest is not None
    missing = missing_facts(one.name, one.manifest)
    problems = [*([missing] if missing else []), *(file.problem for file in files if file.problem)]
    if not problems:
        return replace(one, whole=True, problem=None)
    changed = workers.call(paths.root, _changed, folder_of(paths, one), one.manifest)
    if changed:
        return replace(one, committed=False, whole=None, problem=changed)
    more = f"; and {len(problems) - MAX_PROBLEMS} files more" if len(problems) > MAX_PROBLEMS else ""
    known = missing is not None or any(file.whole is False for file in files)
    return replace(one, whole=False if known else None, problem="; ".join(problems[:MAX_PROBLEMS]) + more)


def _changed(folder: Path, manifest: Manifest) -> str | None:
    """A description of the run's change to a folder since its manifest was read; None if there is none."""
    try:
        return None if read_manifest(folder) == manifest else "rewritten while it was read"
    except LayoutError:
        return "pruned or rewritten while it was read"
