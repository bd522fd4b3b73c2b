"""Which checkpoint to resume from: the newest that every rank finds whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainer.checkpoint import DamagedError, Loaded, load
from trainer.layout import CheckpointName, RunPaths, list_checkpoints
from trainer.together import Together


@dataclass
class Found:
    """What the search gave; the same choice on every rank."""

    loaded: Loaded | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)
    """Rank 0's: {checkpoint, reason} of each that was not whole, newest first."""


def find_whole(together: Together, paths: RunPaths, between: Callable[[], None]) -> Found:
    """Load the newest checkpoint that every rank reads as its manifest says, newest first.

    Rank 0 chooses, each rank reads and hashes for itself, and one rank's doubt is enough for all to go on to the one
    before. A folder that vanishes meanwhile was pruned by another attempt: rank 0 lists again.

    Raises:
        LayoutVersionError: a newer release wrote one of them.
        PeerGoneError: another rank is gone.
    """
    found, seen, turn = Found(), set[str](), 0
    while True:
        between()

        def choose() -> str | None:
            names = [name for name in list_checkpoints(paths) if str(name) not in seen]
            return str(names[0]) if names else None

        choice = together.rank0_does(f"restore/{turn}", choose, between)
        if choice is None:
            return found
        seen.add(choice)
        name = CheckpointName.parse(choice)
        assert name
        with together.beating(f"beat/verdict/{turn}/{together.rank}"):
            loaded, reason = _try_load(paths, name)
        verdicts: list[Any] = together.gather(f"verdict/{turn}", reason, between)
        problems = [(rank, verdict) for rank, verdict in enumerate(verdicts) if verdict is not None]
        if not problems:
            found.loaded = loaded
            return found
        rank, why = problems[0]
        if why != "gone":
            found.rejected.append({"checkpoint": choice, "reason": why if rank == 0 else f"{why} (rank {rank})"})
        turn += 1


def _try_load(paths: RunPaths, name: CheckpointName) -> tuple[Loaded | None, str | None]:
    try:
        return load(paths.checkpoint(name)), None
    except FileNotFoundError:
        return None, "gone"
    except (DamagedError, OSError) as error:
        return None, str(error)
