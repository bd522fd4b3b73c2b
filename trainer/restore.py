"""Which checkpoint to resume from: the newest that every rank finds whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainer.attempt import pause
from trainer.checkpoint import DamagedError, Loaded, load
from trainer.layout import EXIT_FAILED, CheckpointName, RunPaths, list_checkpoints
from trainer.saving import BucketError, fatal_code
from trainer.together import Together

READ_TRIES = 6


class ReadError(BucketError):
    """The bucket cannot be read; the attempt starts nothing anew."""


@dataclass
class Found:
    """What the search gave; the same choice on every rank."""

    loaded: Loaded | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Rank 0's: {checkpoint, reason} of each that was not whole, newest first."""


def find_whole(together: Together, paths: RunPaths, between: Callable[[], None]) -> Found:
    """Load the newest checkpoint that every rank reads as its manifest says, newest first.

    Rank 0 chooses, each rank reads and hashes for itself, and one rank's doubt is enough for all to go on to the one
    before. A folder that vanishes meanwhile was pruned by another attempt: rank 0 lists again. A file that cannot be
    read is not damaged: it is tried again, and then the attempt ends, because to start from an older checkpoint, or
    from none, would throw steps away that are not lost.

    Raises:
        LayoutVersionError: a newer release wrote one of them.
        PeerGoneError: another rank is gone.
        ReadError: some rank cannot read the bucket.
    """
    found, seen, turn = Found(), set[str](), 0
    while True:
        between()

        def choose() -> str | None:
            names = [name for name in list_checkpoints(paths) if str(name) not in seen]
            return str(names[0]) if names else None

        choice = together.rank0_does(f"restore/{turn}", lambda: again(choose, between), between)
        if choice is None:
            return found
        seen.add(choice)
        name = CheckpointName.parse(choice)
        assert name
        with together.beating(f"beat/verdict/{turn}/{together.rank}"):
            loaded, reason, code = _try_load(paths, name, between)
        verdicts: list[Any] = together.gather(f"verdict/{turn}", [reason, code], between)
        for why, code in verdicts:
            if code is not None:
                raise ReadError(f"checkpoint {choice} cannot be read: {why}. Nothing that was committed is lost.", code)
        problems = [(rank, why) for rank, (why, _) in enumerate(verdicts) if why is not None]
        if not problems:
            found.loaded = loaded
            return found
        rank, why = problems[0]
        if why != "gone":
            found.rejected.append({"checkpoint": choice, "reason": why if rank == 0 else f"{why} (rank {rank})"})
        turn += 1


def _try_load(
    paths: RunPaths, name: CheckpointName, between: Callable[[], None]
) -> tuple[Loaded | None, str | None, int | None]:
    """(the checkpoint, what is wrong with it, the exit code where that cannot be known)."""
    try:
        return again(lambda: load(paths.checkpoint(name)), between), None, None
    except FileNotFoundError:
        return None, "gone", None
    except DamagedError as error:
        return None, str(error), None
    except ReadError as error:
        return None, str(error), error.code


def again(read: Callable[[], Any], between: Callable[[], None]) -> Any:
    """Read, and read again after a while where the bucket fails.

    Raises:
        FileNotFoundError: it is not there.
        ReadError: it fails for good.
    """
    for try_number in range(READ_TRIES):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError as error:
            code = fatal_code(error)
            if code is not None or try_number == READ_TRIES - 1:
                where = f"{error.filename}: " if error.filename else ""
                raise ReadError(f"{where}{error.strerror or error}", EXIT_FAILED if code is None else code) from None
        pause(0.5 * 2**try_number, between)
    raise AssertionError
