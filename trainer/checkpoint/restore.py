"""Which checkpoint to resume from: the newest that every rank finds whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainer.bucket.deadlines import within
from trainer.bucket.retry import pause, retry_loop
from trainer.checkpoint.contents import open_checkpoint
from trainer.checkpoint.damage import DamagedError
from trainer.checkpoint.errors import ReadError, fatal_code
from trainer.checkpoint.reading import read
from trainer.checkpoint.state import State, rebuilt, wanted
from trainer.layout.exit_codes import EXIT_FAILED
from trainer.layout.identity import is_of
from trainer.layout.manifest import Manifest
from trainer.layout.names import MANIFEST, CheckpointName, RunPaths, list_checkpoints
from trainer.ranks.group import RankGroup

_T = TypeVar("_T")
NOT_FINITE = "its weights are not finite (NaN or infinite)"
READ_TRIES = 6
FIRST_RETRY_S = 0.5
UNSEEN_S = 20.0
"""How long a machine's mount may take to show what another machine's has shown."""


@dataclass(frozen=True)
class Loaded:
    """What this rank needs of a whole checkpoint, in memory."""

    name: CheckpointName
    manifest: Manifest
    tensors: dict[str, torch.Tensor]
    """On the host; cut over the ranks where the live ones are."""
    plain: dict[str, Any]
    digest: str
    """The same on all ranks that have read the same."""


@dataclass
class Found:
    """What the search gave; the same choice on every rank."""

    loaded: Loaded | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Rank 0's: {checkpoint, reason} of each that was not whole, newest first."""


def find_whole(
    group: RankGroup,
    paths: RunPaths,
    live: State,
    check_stop: Callable[[], None],
    run_id: str | None = None,
    only_finite: bool = False,
) -> Found:
    """Load the newest checkpoint that all ranks find as its manifest says, newest first.

    Rank 0 chooses, each rank reads what it needs of `live`, every share is hashed by one rank at least, and one rank's
    doubt is enough for all to go on to the checkpoint before. A folder that vanishes meanwhile was pruned by another
    attempt: rank 0 lists again. A file that cannot be read is not damaged: it is tried again, for half a minute. Then
    an older checkpoint is taken, if one can be read; the attempt ends if none can, because to start from none would
    throw away what is not lost.

    Args:
        group: The ranks.
        paths: The run's.
        live: The state that is to become the checkpoint's.
        check_stop: Called while waiting; raises to stop.
        run_id: Rank 0's: another run's checkpoints are rejected; None: whatever lies there is this run's.
        only_finite: Those whose weights are not finite are rejected.

    Raises:
        LayoutVersionError: a newer release wrote one of them.
        PeerGoneError: another rank is gone.
        ReadError: the mount is gone on some rank, or no checkpoint can be read though there are some.
    """
    found, seen, turn = Found(), set[str](), 0
    unreadable: dict[str, ReadError] = {}
    asked_twice = False
    while True:
        check_stop()

        def choose() -> str | None:
            with within("listing checkpoints"):
                names = [name for name in list_checkpoints(paths) if str(name) not in seen]
            return str(names[0]) if names else None

        choice = group.rank0_does(f"restore/{turn}", lambda: retry_read(choose, check_stop), check_stop)
        if choice is None:
            if unreadable:
                raise next(iter(unreadable.values()))
            return found
        seen.add(choice)
        name = CheckpointName.parse(choice)
        assert name
        with group.before_gather(f"verdict/{turn}"):
            loaded, reason, code = _try_load(group, paths, name, live, check_stop, run_id, only_finite)
        digest = loaded.digest if loaded else None
        verdicts: list[Any] = group.gather(f"verdict/{turn}", [reason, code, digest], check_stop)
        turn += 1
        cannot = [(code == EXIT_FAILED, rank, why, code) for rank, (why, code, _) in enumerate(verdicts) if code]
        if cannot:
            _, rank, why, code = min(cannot)
            error = ReadError(f"checkpoint {choice} cannot be read: {why}. Nothing that was committed is lost.", code)
            if code != EXIT_FAILED:
                raise error
            unreadable[choice] = error
            found.rejected.append({"checkpoint": choice, "reason": _on(rank, f"it cannot be read: {why}")})
            continue
        problems = [(rank, why) for rank, (why, _, _) in enumerate(verdicts) if why is not None]
        problems += [(rank, "it reads otherwise than on rank 0") for rank, v in enumerate(verdicts) if v[2] != digest]
        if not problems and unreadable and not asked_twice:
            # The bucket answers again: so may the newer ones that it would not give.
            asked_twice = True
            seen.difference_update({choice, *unreadable})
            found.rejected = [one for one in found.rejected if one["checkpoint"] not in unreadable]
            unreadable, loaded = {}, None
            continue
        if not problems:
            found.loaded = loaded
            return found
        rank, why = problems[0]
        if why != "gone":
            found.rejected.append({"checkpoint": choice, "reason": _on(rank, why)})


def _on(rank: int, why: str) -> str:
    return why if rank == 0 else f"{why} (rank {rank})"


def load(
    folder: Path, live: State, rank: int = 0, ranks: int = 1, run_id: str | None = None, only_finite: bool = False
) -> Loaded:
    """Read what a rank needs of a checkpoint; errors as of `reading.open_checkpoint` and `reading.read`.

    Args:
        folder: The checkpoint's.
        live: The state that it shall become: says which tensors are cut over the ranks, and how.
        rank: This rank.
        ranks: How many there are: the shares are dealt to them to be hashed.
        run_id: Another run's checkpoint counts as damaged, and is not read; None: any is this run's.
        only_finite: So does one whose weights are not finite.
    """
    opened = open_checkpoint(folder)
    if not is_of(opened.manifest, run_id):
        raise DamagedError(f"it is another run's ({opened.manifest.facts.get('run_id')}, and not {run_id})")
    if only_finite and not opened.manifest.finite:
        raise DamagedError(NOT_FINITE)
    mine = set(sorted(opened.headers)[rank::ranks])
    parts = read(opened, wanted(live, opened.tensors, rank), mine.__contains__)
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
) -> tuple[Loaded | None, str | None, int | None]:
    """(the checkpoint, what is wrong with it, the exit code where that cannot be known)."""
    folder, end = paths.checkpoint(name), time.monotonic() + UNSEEN_S

    def read_it() -> Loaded:
        return load(folder, live, group.rank, group.world_size, run_id, only_finite)

    while True:
        try:
            return retry_read(read_it, check_stop), None, None
        except ReadError as error:
            return None, str(error), error.code
        except (FileNotFoundError, DamagedError) as error:
            problem = error
        try:
            gone = not _is_there(folder / MANIFEST, check_stop)
            # Another machine's mount may show new files a little later than the mount of rank 0, who saw this one.
            if not gone or not group.rank or not group.several_nodes or time.monotonic() > end:
                return None, "gone" if gone and not _is_there(folder, check_stop) else str(problem), None
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

    pauses_s = (FIRST_RETRY_S * 2**number for number in range(READ_TRIES - 1))
    return retry_loop(read, final_error, pauses_s, check_stop)
