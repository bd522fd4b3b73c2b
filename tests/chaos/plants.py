"""Mistakes to plant in the code under test; the campaign must find each. An attempt plants them in its own process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.bucket import mounts
from trainer.bucket.hashing import Hasher
from trainer.checkpoint import commit, contents, pruning, restore, saving, share_report, staging, targets, writing
from trainer.layout.manifest import FileRecord
from trainer.ranks import group


def marker_written_early(but: str = "", late_s: float = 0.01) -> None:
    """The manifest is written `late_s` before the shares are complete; a share named `but` is complete in time."""
    real = writing.write_share

    def write_share(path: Path, parts: Any, fetch: Any, staged: Any = None) -> FileRecord:
        if path.name == but:
            return real(path, parts, fetch, staged)
        copy = Path("/dev/shm") / f"chaos-{path.parent.name}-{os.getpid()}"
        record = real(copy, parts, fetch)
        data = copy.read_bytes()
        copy.unlink()

        def later() -> None:
            time.sleep(late_s)
            path.write_bytes(data)

        threading.Thread(target=later).start()
        return record

    writing.write_share = write_share


def hash_not_checked() -> None:
    """A file of the right size is accepted whatever its hash."""

    class Believes(Hasher):
        def hexdigest(self) -> Any:
            return type("Any", (str,), {"__ne__": lambda self, other: False, "__eq__": lambda self, other: True,
                                        "__hash__": str.__hash__})("x")  # fmt: skip

    targets.Hasher = Believes  # type: ignore[misc]


def pruned_before_verified() -> None:
    """A committed checkpoint counts as verified without being read back."""
    pruning.problem = lambda folder, manifest, past_cache: None


def buffer_copied_late() -> None:
    """Buffers are copied in the background, as parameters are."""
    real = staging.Staging.begin
    staging.Staging.begin = lambda self, parts, live, steady: real(self, parts, live, live.keys())  # type: ignore[method-assign]


def step_before_the_copy() -> None:
    """The optimizer does not wait for the copy."""
    assert callable(saving.Saver.await_copied)
    saving.Saver.await_copied = lambda self: None  # type: ignore[method-assign]
    real = staging.Copy.run

    def run(self: staging.Copy) -> None:
        time.sleep(0.002)
        real(self)

    staging.Copy.run = run  # type: ignore[method-assign]


def change_not_noticed() -> None:
    """A tensor that changes while it is copied goes unnoticed."""
    assert callable(staging.version), "under another name, nothing would be planted"
    staging.version = lambda tensor: 0


def read_back_trusted_on_a_cached_mount() -> None:
    """A checkpoint that was read back through the mount's cache counts as being in the store."""
    real = mounts.mount_of

    def mount_of(path: Path) -> mounts.Mount:
        found = real(path)
        return mounts.Mount(found.point, found.kind, mounts.Proof.READ_BACK)

    pruning.mount_of = mount_of


def oldest_first() -> None:
    """A restore tries the oldest checkpoint first."""
    real = restore.list_checkpoints
    restore.list_checkpoints = lambda paths: real(paths)[::-1]


def another_run_not_noticed() -> None:
    """Every checkpoint in the run's folder counts as the run's own."""
    restore.is_of = lambda manifest, run_id: True


def full_bucket_ridden_out() -> None:
    """A failed write is retried whatever the error, and failed saves never end the attempt."""
    share_report.fatal_code = commit.fatal_code = lambda error: None
    saving.Saver._given_up = property(lambda self: 0, lambda self, count: None)  # type: ignore[assignment]


def newer_attempt_not_noticed() -> None:
    """A save does not check for a newer attempt."""
    commit.newer_attempt = lambda attempt: None


def name_not_compared() -> None:
    """A manifest is accepted whatever the name of its folder."""
    real = contents.missing_facts
    contents.missing_facts = lambda name, manifest: real("", manifest)


def old_ones_deleted_first() -> None:
    """Old checkpoints are deleted before the new one is written."""
    real = writing.write_share

    def write_share(path: Path, *args: Any) -> FileRecord:
        for folder in path.parents[1].iterdir():
            if folder != path.parent:
                pruning.delete(folder)
        return real(path, *args)

    writing.write_share = write_share


def doubt_not_heard() -> None:
    """Only the first rank's verdict on a checkpoint counts; other ranks' verdicts are ignored."""
    real = group.RankGroup.gather

    def gather(self: Any, name: str, value: Any, *args: Any) -> list[Any]:
        found = real(self, name, value, *args)
        return [[*found[0][:2], value[2]]] * len(found) if name.startswith("verdict/") else found

    group.RankGroup.gather = gather  # type: ignore[method-assign]


def both(*plants: Callable[[], None]) -> Callable[[], None]:
    def plant() -> None:
        for one in plants:
            one()

    return plant


PLANTS: dict[str, tuple[str, Callable[[], None]]] = {
    "marker written early": ("local", marker_written_early),
    "hash not checked": ("local", hash_not_checked),
    "pruned before verified": ("sequential", pruned_before_verified),
    "buffer copied late": ("local", both(buffer_copied_late, change_not_noticed)),
    "step before the copy": ("local", both(step_before_the_copy, change_not_noticed)),
    "read-back trusted on a cached mount": ("rclone-cached", read_back_trusted_on_a_cached_mount),
    "oldest first": ("local", oldest_first),
    "another run not noticed": ("local", another_run_not_noticed),
    "full bucket ridden out": ("sequential", full_bucket_ridden_out),
    "newer attempt not noticed": ("local", newer_attempt_not_noticed),
    "name not compared": ("local", name_not_compared),
    "old ones deleted first": ("local", old_ones_deleted_first),
    "another rank's share not waited for": ("local-ranks", lambda: marker_written_early(writing.share_name(0), 0.1)),
    "another rank's doubt not heard": ("local-ranks", doubt_not_heard),
}
"""By name: the store on which the mistake shows, and the function that plants it."""
