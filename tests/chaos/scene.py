"""Scene: a run on a store, and the attempts that one fault strikes."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import truth
from attempt import STANDS_STILL_S, Plan
from child import Child, start
from stores import Place
from wait import readable
from watch import Watch

STEPS = 4

OF_EACH_RANK = ("folder-made", "share-half", "share-written")
"""The points of a save that every rank passes."""

OTHER = 50
"""The other run's number, relative to this run's."""

Strike = Callable[["Scene"], bool]


@dataclass
class Scene:
    """A run on a store, with the attempts of the current fault."""

    place: Place
    run_dir: Path
    behind: Path
    other: Path
    """Another run's folder behind the mount, with whole checkpoints."""
    plan: Plan
    draw: random.Random
    before: list[truth.Whole]
    """The whole checkpoints in the store before the attempt began."""
    children: list[Child]
    """The attempts; the first restores what the fault has left."""
    later_s: float
    """Estimated seconds from an attempt's restore to its end."""
    watch: Watch
    """Looks behind the mount while attempts live."""
    at_once: bool = False
    """Two attempts began together: the first may restore what the second has saved."""

    def begin(self, **changes: object) -> Child:
        """Start an attempt."""
        self.watch.begin()
        if self.place.ranks > 1:
            ranks = self.draw.randint(1, self.place.ranks)
            point, _ = changes.get("kill_at") or ("", 0)  # type: ignore[misc]
            changes |= {"ranks": ranks, "kill_rank": self.draw.randrange(ranks) if point in OF_EACH_RANK else 0}
        child = start(replace(self.plan, **changes))  # type: ignore[arg-type]
        self.children.append(child)
        return child

    def rank_of(self, child: Child) -> int | None:
        """Draw the rank of an attempt that a fault strikes; None: all of them."""
        if child.plan.ranks == 1 or self.draw.random() < 0.3:
            return None
        return self.draw.randrange(child.plan.ranks)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of a checkpoint that faults can name."""
        return FILES if self.place.ranks == 1 else FILES_OF_SEVERAL


def until_restored(child: Child) -> bool:
    """Wait until all its ranks have restored; False if it ended before."""
    while not child.all_restored and readable(child.pipe, STANDS_STILL_S):
        if not child.read():
            return False
    return child.all_restored


def let_go(child: Child, seconds: float) -> None:
    """Let an attempt run for some seconds, or until it ends."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and readable(child.pipe, left):
        if not child.read():
            return


def hangs(child: Child) -> bool:
    """Wait until a thread is blocked in the mount; False if the attempt ends, or after a second."""
    end = time.monotonic() + 1
    while child.lives and not child.left and time.monotonic() < end:
        for task in (task for pid in child.pids for task in Path(f"/proc/{pid}/task").glob("*/wchan")):
            with contextlib.suppress(OSError):
                if task.read_text() in ("request_wait_answer", "__fuse_simple_request", "fuse_simple_request"):
                    return True
        let_go(child, 0.005)
    return False


def folder_of(run_dir: Path, whole: truth.Whole) -> Path:
    return run_dir / "checkpoints" / str(whole)


FILES = ("share-00000.safetensors", "state.json", "MANIFEST.json")

SECOND_SHARE = "share-00001.safetensors"

FILES_OF_SEVERAL = (*FILES, SECOND_SHARE)
