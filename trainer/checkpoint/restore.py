"""Restore: finds the checkpoint to resume from, the newest that every rank finds whole, and loads it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer.bucket.deadlines import within
from trainer.bucket.retry import pause, retry_loop
from trainer.checkpoint.contents import open_checkpoint
from trainer.checkpoint.damage import DamagedError
from trainer.checkpoint.errors import ReadError, fatal_code
from trainer.checkpoint.reading import Memory, fresh, read
from trainer.checkpoint.state import State, rebuilt, wanted
from trainer.layout.exit_codes import EXIT_FAILED
from trainer.layout.identity import is_of
from trainer.layout.manifest import Manifest
from trainer.layout.names import MANIFEST, CheckpointName, RunPaths, list_checkpoints
from trainer.ranks.group import RankGroup

NOT_FINITE = "its weights are not finite (NaN or infinite)"
READ_TRIES = 6
FIRST_RETRY_S = 0.5
UNSEEN_S = 20.0
"""The time that a machine's mount may take to show a file that another machine's mount shows already."""
_VANISHED = "gone"
"""The reason of a rank for a checkpoint whose folder vanished."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Loaded:
    """A whole checkpoint in memory, as far as this rank needs it."""

    name: CheckpointName
    manifest: Manifest
    tensors: dict[str, torch.Tensor]
    """On the host; cut over the ranks if the live ones are."""
    plain: dict[str, Any]
    digest: str
    """The same on all ranks that have read the same."""


@dataclass
class Found:
    """The result of the search; every rank makes the same choice."""

    loaded: Loaded | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Rank 0's: {checkpoint, reason} of each that was not whole, newest first."""


Doubt = tuple[str | None, int | None, str | None]
"""A rank's verdict: (what is wrong, the exit code if it could not be read, the digest of what was read)."""


def find_whole(
    group: RankGroup,
    paths: RunPaths,
    live: State,
    check_stop: Callable[[], None],
    run_id: str | None = None,
    only_finite: bool = False,
    memory: Memory = fresh,
) -> Found:
    """Load the newest checkpoint that is as its manifest says on all ranks, trying the newest first.

    Rank 0 chooses, each rank reads what it needs of `live`, and at least one rank hashes every share. If one rank finds
    a fault, all go on to the next older checkpoint. If a folder vanishes meanwhile, another attempt pruned it: rank 0
    lists again. A file that cannot be read is not damaged: reading is retried for half a minute. Then an older
    checkpoint is taken, if one can be read. The attempt ends if none can: to start afresh would discard saved steps.

    Args:
        group: The ranks.
        paths: The run's.
        live: The state that is to become the checkpoint's.
        check_stop: Called while waiting; raises to stop.
        run_id: Rank 0's: another run's checkpoints are rejected; None: every checkpoint there is this run's.
        only_finite: Reject checkpoints whose weights are not finite.
        memory: Returns the memory that each tensor is read into.

    Raises:
        LayoutVersionError: a newer release wrote one of them.
        PeerGoneError: another rank is gone.
        ReadError: the mount is gone on some rank, or there are checkpoints and none can be read.
    """
    search = _Search(paths)
    for turn in itertools.count():
        check_stop()
        choice = group.rank0_does(f"restore/{turn}", lambda: retry_read(search.newest, check_stop), check_stop)
        if choice is None:
            return search.nothing()
        name = CheckpointName.parse(choice)
        assert name
        with group.before_gather(f"verdict/{turn}"):
            loaded, reason, code = _try_load(group, paths, name, live, check_stop, run_id, only_finite, memory)
        digest = loaded.digest if loaded else None
        verdicts: list[Doubt] = group.gather(f"verdict/{turn}", [reason, code, digest], check_stop)
        if search.is_whole(choice, verdicts):
            search.found.loaded = loaded
            return search.found
        loaded = None  # Its memory is free for the next one.
    raise AssertionError


class _Search:
    """The search, as every rank follows it."""

    def __init__(self, paths: RunPaths) -> None:
        self.found = Found()
        self._paths = paths
        self._seen: set[str] = set()
        self._unreadable: dict[str, ReadError] = {}
        self._retried_unreadable = False

    def newest(self) -> str | None:
        """The newest checkpoint that was not tried yet; None if all were. Rank 0 alone asks."""
        with within("listing checkpoints"):
            names = [name for name in list_checkpoints(self._paths) if str(name) not in self._seen]
        return str(names[0]) if names else None

    def nothing(self) -> Found:
        """The result where no checkpoint is whole.

        Raises:
            ReadError: a checkpoint could not be read.
        """
        for error in self._unreadable.values():
            raise error
        return self.found

    def is_whole(self, choice: str, verdicts: Sequence[Doubt]) -> bool:
        """True if the search ends with a checkpoint, given each rank's verdict.

        Raises:
            ReadError: the mount is gone on some rank.
        """
        self._seen.add(choice)
        failed = [(code == EXIT_FAILED, rank, why, code) for rank, (why, code, _) in enumerate(verdicts) if code]
        if failed:
            _, rank, why, code = min(failed)
            error = ReadError(f"checkpoint {choice} cannot be read: {why}. No committed checkpoint is lost.", code)
            if code != EXIT_FAILED:
                raise error
            self._unreadable[choice] = error
            self._reject(choice, rank, f"it cannot be read: {why}")
            return False
        problems = [(rank, why) for rank, (why, _, _) in enumerate(verdicts) if why is not None]
        problems += [
            (rank, "its contents differ from those on rank 0")
            for rank, (_, _, digest) in enumerate(verdicts)
            if digest != verdicts[0][2]
        ]
        if problems:
            rank, why = problems[0]
            if why != _VANISHED:
                self._reject(choice, rank, why)
            return False
        if self._unreadable and not self._retried_unreadable:
            # The bucket answers again: perhaps it gives the newer checkpoints too.
            self._retried_unreadable = True
            self._seen.difference_update({choice, *self._unreadable})
            self.found.rejected = [one for one in self.found.rejected if one["checkpoint"] not in self._unreadable]
            self._unreadable = {}
            return False
        return True

    def _reject(self, choice: str, rank: int, why: str) -> None:
        reason = why if rank == 0 else f"{why} (rank {rank})"
        self.found.rejected.append({"checkpoint": choice, "reason": reason})


def load(
    folder: Path,
    live: State,
    rank: int = 0,
    ranks: int = 1,
    run_id: str | None = None,
    only_finite: bool = False,
    memory: Memory = fresh,
) -> Loaded:
    """Read what a rank needs of a checkpoint; errors as of `contents.open_checkpoint` and `reading.read`.

    Args:
        folder: The checkpoint's.
        live: The state that is to become the checkpoint's; it shows which tensors are cut over the ranks, and how.
        rank: This rank.
        ranks: The number of ranks; each hashes some of the shares.
        run_id: Another run's checkpoint counts as damaged, and is not read; None: every checkpoint is this run's.
        only_finite: A checkpoint whose weights are not finite counts as damaged too.
        memory: Returns the memory that each tensor is read into.
    """
    opened = open_checkpoint(folder)
    if not is_of(opened.manifest, run_id):
        raise DamagedError(f"it belongs to another run ({opened.manifest.facts.get('run_id')}, not {run_id})")
    if only_finite and not opened.manifest.finite:
        raise DamagedError(NOT_FINITE)
    mine = set(sorted(opened.headers)[rank::ranks])
    parts = read(opened, wanted(live, opened.tensors, rank), mine.__contains__, memory)
    name = CheckpointName.parse(folder.name)
    assert name
    return Loaded(name, opened.manifest, rebuilt(live, opened.tensors, parts), opened.plain, opened.digest)


def _try_load(
    group: RankGroup,
    paths: RunPaths,
    name: CheckpointName,
    live: State,
    check_stop: Callable[[], None],
    run_id: str | None,
    only_finite: bool = False,
    memory: Memory = fresh,
) -> tuple[Loaded | None, str | None, int | None]:
    """(the checkpoint, what is wrong with it, the exit code if it could not be read)."""
    folder, end = paths.checkpoint(name), time.monotonic() + UNSEEN_S

    def read_it() -> Loaded:
        return load(folder, live, group.rank, group.world_size, run_id, only_finite, memory)

    while True:
        try:
            return retry_read(read_it, check_stop), None, None
        except ReadError as error:
            return None, str(error), error.code
        except (FileNotFoundError, DamagedError) as error:
            problem = error
        try:
            gone = not _is_there(folder / MANIFEST, check_stop)
            # The mount of another machine may show new files later than the mount of rank 0, which listed this one.
            if not gone or not group.rank or not group.unsupervised or time.monotonic() > end:
                return None, _VANISHED if gone and not _is_there(folder, check_stop) else str(problem), None
        except ReadError as error:
            return None, str(error), error.code
        pause(1.0, check_stop)


def _is_there(path: Path, check_stop: Callable[[], None]) -> bool:
    def look() -> bool:
        with within(f"looking for {path.name}"):
            return path.exists()

    return retry_read(look, check_stop)


def retry_read(read: Callable[[], _T], check_stop: Callable[[], None]) -> _T:
    """Read from the bucket, and retry for a while if it fails.

    Raises:
        FileNotFoundError: the file does not exist.
        ReadError: the bucket failed at every try, or no retry helps.
    """

    def final_error(error: Exception, no_try_left: bool) -> Exception | None:
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
            return error
        code = fatal_code(error)
        if code is None and not no_try_left:
            return None
        where = f"{error.filename}: " if error.filename else ""
        return ReadError(f"{where}{error.strerror or error}", EXIT_FAILED if code is None else code)

    return retry_loop(read, final_error, (FIRST_RETRY_S * 2**n for n in range(READ_TRIES - 1)), check_stop)
