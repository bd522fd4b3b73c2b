"""Prepared data on a machine's local disk: one copy for all of its processes, verified while it is copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from trainer.bucket.deadlines import opened, read_manifest, within
from trainer.bucket.hashing import CHUNK_BYTES, Hasher
from trainer.bucket.retry import pauses, retry_loop
from trainer.errors import AttemptError
from trainer.finetune.sources import DataError
from trainer.layout.documents import LayoutError, LayoutVersionError, says_not_there
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import RunPaths
from trainer.machine import scratch

if TYPE_CHECKING:
    from trainer.training.run import SpotRun

LISTING_LAG_S = 20.0
"""Mounts of one bucket may take 10 s to see each other's new files."""
LOOK_S = 0.5
READS = 2
"""The number of reads before a file counts as damaged."""


class DamagedError(DataError):
    """A file of prepared data differs from its manifest."""


@dataclass(frozen=True)
class Tokens:
    """A run's prepared data, on local disk."""

    folder: str
    """The folder's name under tokens/."""
    key: str
    train: np.ndarray
    """(samples, seq_len)"""
    held_out: np.ndarray
    """(samples, seq_len), for evaluation only."""
    vocab_size: int

    def highest_id(self) -> int:
        """The highest token id; this reads all data."""
        rows = max(1, CHUNK_BYTES // max(1, self.train[:1].nbytes))
        parts = (
            part[start : start + rows] for part in (self.train, self.held_out) for start in range(0, len(part), rows)
        )
        return max((int(part.max()) for part in parts), default=0)


def manifest_of(
    paths: RunPaths, folder: str, check_stop: Callable[[], None] = lambda: None, patience_s: float = LISTING_LAG_S
) -> Manifest:
    """The manifest of prepared data; waits for a mount that shows another machine's files late.

    Raises:
        DataError: the manifest is missing or torn.
    """
    source = paths.tokens / folder

    def final_error(error: Exception, no_try_left: bool) -> Exception | None:
        if not isinstance(error, LayoutError) or isinstance(error, LayoutVersionError):
            return error
        return DataError(f"{source}: {error}") if no_try_left else None

    return retry_loop(lambda: read_manifest(source), final_error, pauses(patience_s, LOOK_S, LOOK_S), check_stop)


@contextmanager
def copied(
    paths: RunPaths, folder: str, manifest: Manifest, check_stop: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Copy prepared data to a temporary folder on local disk, and verify the hashes in its manifest.

    Raises:
        DamagedError: a file is missing or differs from its manifest, twice.
        ScratchError: the local disk is full.
        OSError: the bucket cannot be read now.
    """
    with scratch.folder("tokens", manifest.total_bytes) as local:
        for name, record in manifest.files.items():
            for read in range(1, READS + 1):
                try:
                    _copy(paths.tokens / folder / name, local / name, record, check_stop)
                    break
                except DamagedError:
                    if read == READS:
                        raise
        yield local


def _copy(source: Path, target: Path, record: FileRecord, check_stop: Callable[[], None]) -> None:
    hasher, size = Hasher(), 0
    try:
        with opened(source, "prepared data") as file, target.open("wb", buffering=0) as copy:
            while chunk := _read(file):
                check_stop()
                hasher.update(chunk)
                size += len(chunk)
                with scratch.local(target.parent):
                    view = memoryview(chunk)
                    while view:
                        view = view[copy.write(view) :]
    except OSError as error:
        if error.filename in (None, str(source)) and says_not_there(error):
            raise DamagedError(f"{source} is missing") from None
        raise
    if found := record.size_problem(source, size) or record.hash_problem(source, hasher.hexdigest()):
        raise DamagedError(found)


def _read(file: BinaryIO) -> bytes:
    with within("reading prepared data"):
        return file.read(CHUNK_BYTES)


def open_copy(folder: str, manifest: Manifest, local: Path) -> Tokens:
    """Map a local copy into memory, so that no step reads the bucket."""
    facts = manifest.facts
    train, held_out = (
        np.memmap(local / name, dtype=facts["dtype"], mode="r", shape=(facts[count], facts["seq_len"]))
        for name, count in (("train.bin", "n_train"), ("held_out.bin", "n_held_out"))
    )
    return Tokens(folder, facts["key"], train, held_out, facts["vocab_size"])


def on_this_machine(run: SpotRun, folder: str, stack: ExitStack, made: Path | None) -> Tokens:
    """Open a run's prepared data, from one copy per machine.

    The copy is deleted as soon as every rank has mapped it: the system keeps its pages while a process uses them, and
    nothing is left behind however the processes end.

    Args:
        run: The attempt.
        folder: The name of the folder under tokens/.
        stack: Owns the copy.
        made: The copy, if rank 0 has made it already.

    Raises:
        AttemptError: this machine cannot read what the first machine has read.
    """

    def copy() -> str:
        return str(stack.enter_context(copied(run.paths, folder, manifest, run.check_stop)))

    def copy_once() -> str:
        if made:
            return str(made)
        try:
            return str(run.retry(copy, math.inf))
        except DamagedError as error:
            raise AttemptError(f"{error}, although rank 0 could read it", EXIT_PREEMPTED) from None

    with stack, run.group.before_gather("tokens-mapped"):  # Another machine may copy much faster.
        manifest = run.retry(lambda: manifest_of(run.paths, folder, run.check_stop), math.inf)
        local = Path(run.group.machine_does("tokens", copy_once, run.check_stop))
        tokens = open_copy(folder, manifest, local)
        run.group.gather("tokens-mapped", True, run.check_stop)
    return tokens
