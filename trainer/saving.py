"""The commit protocol: from a snapshot in host memory to a committed checkpoint, in the background.

One save is in flight at a time, on a thread of each rank. The ranks tell rank 0 what they wrote through the store,
never through a directory listing; rank 0 alone decides whether the save is committed, tried again in a new folder, or
given up, and all ranks follow.
"""

from __future__ import annotations

import errno
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint
from trainer.attempt import FULL, REFUSED, Attempt, newer_attempt, record, superseded
from trainer.layout import (
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_SUPERSEDED,
    MANIFEST,
    STATE,
    AttemptName,
    CheckpointName,
    FileRecord,
    LayoutError,
    Manifest,
    RunPaths,
    list_checkpoints,
    read_manifest,
)
from trainer.records import Records
from trainer.together import BEAT_S, PeerGoneError, Together, wait_for
from trainer.verify import problem

_MOUNT_GONE = {errno.ENOTCONN, errno.ESTALE, errno.ENODEV}
TRIES = 6
GIVEN_UP_IN_A_ROW = 3


class BucketError(Exception):
    """The bucket fails; the attempt ends with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class SaveError(BucketError):
    """The bucket cannot be written."""


def fatal_code(error: OSError) -> int | None:
    """The exit code that a failed write ends the attempt with at once; None where it is worth another try."""
    if error.errno in FULL | REFUSED:
        return EXIT_FAILED
    return EXIT_PREEMPTED if error.errno in _MOUNT_GONE else None


def describe(error: OSError, where: Path) -> str:
    """What, where and the remedy, in a line."""
    reason = f"{where}: {error.strerror or error}"
    if error.errno in FULL:
        return f"{reason}. Make room there, or name another bucket; nothing that was committed is lost."
    if error.errno in REFUSED:
        return f"{reason}. Give this machine the right to write there; nothing that was committed is lost."
    return reason


@dataclass
class Snapshot:
    """A rank's part of a run's state at a boundary, copied to the host."""

    step: int
    samples: int
    share: dict[str, torch.Tensor]
    plain: dict[str, Any] | None
    """Rank 0's: what goes into state.json."""
    facts: dict[str, Any] | None
    """Rank 0's: what the manifest says besides."""
    stall_s: float
    last: bool = False
    """The attempt ends with it: it is tried again even in a hurry."""
    started: float = field(default_factory=time.monotonic)


class Saver:
    """This rank's writer of checkpoints.

    A save is over for the training once it is decided: committed, or given up. What follows on rank 0 (the record, the
    read-back, the pruning) goes on beside, and a stop does not wait for it.
    """

    def __init__(
        self,
        together: Together,
        paths: RunPaths,
        attempt: Attempt | None,
        records: Records | None,
        keep_latest: int,
        say: Callable[[str], None],
        heard: threading.Event,
    ) -> None:
        """Make a writer that has written nothing yet.

        Args:
            together: This rank's seat.
            paths: The run's.
            attempt: Rank 0's.
            records: Rank 0's.
            keep_latest: How many checkpoints known to be whole are kept.
            say: Prints a line.
            heard: Set once this rank has heard that it has to stop: no wait is long from then on.
        """
        self.committed: CheckpointName | None = None
        self.commit_s: float | None = None
        self._together, self._paths, self._attempt, self._records = together, paths, attempt, records
        self._store: Any = None
        self._attempt_name = attempt.name if attempt else None
        self._keep_latest = max(2, keep_latest)
        self._say = say
        self._save = 0
        self._given_up = 0
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._decided = threading.Event()
        self._heard, self._hurried = heard, threading.Event()
        self._deadline = math.inf
        """Of the agreed stop (monotonic seconds): no further try starts after it."""
        self._reading_back = threading.Lock()
        self._whole: set[CheckpointName] = set()
        self.prunes = not _is_fuse(paths.root)

    def adopt(self, attempt_name: str, restored: CheckpointName | None) -> None:
        """Learn the attempt's name (rank 0's word) and which checkpoint was found whole at the restore."""
        self._attempt_name = AttemptName.parse(attempt_name)
        if restored:
            self._whole.add(restored)
            self.committed = restored

    @property
    def committed_step(self) -> int | None:
        """The step of the newest checkpoint of this attempt, or of the one that it resumed from."""
        return self.committed.step if self.committed else None

    def hurry(self, deadline: float) -> None:
        """All ranks have agreed to stop by then (monotonic seconds): an older boundary's save is not tried again."""
        self._deadline = min(self._deadline, deadline)
        self._hurried.set()

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot; waits first for a save that is still under way."""
        self.wait()
        self._store = self._store or self._together.connection()
        self._decided.clear()
        self._thread = threading.Thread(target=self._work, args=(snapshot,), daemon=True, name="save")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the background.

        Raises:
            SaveError: the attempt cannot go on.
        """
        if self._error:
            raise self._error

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the save under way is decided.

        Raises:
            SaveError: the attempt cannot go on.
        """
        if self._thread:
            self._decided.wait(seconds)
        self.check()

    def settle(self) -> None:
        """Wait until all that follows the last save is done too, or a stop is heard."""
        while self._thread and self._thread.is_alive() and not self._heard.is_set():
            self._thread.join(0.05)

    def _work(self, snapshot: Snapshot) -> None:
        try:
            name = self._write(snapshot)
        except BaseException as error:
            self._error = error
            name = None
        finally:
            self._decided.set()
        if name and self._together.rank == 0:
            self._after_commit(snapshot, name)

    def _write(self, snapshot: Snapshot) -> CheckpointName | None:
        """Write a snapshot, in as many tries as it takes; the name of what is committed, None where it is given up.

        Raises:
            SaveError: the attempt cannot go on.
        """
        assert self._attempt_name
        for try_number in range(TRIES):
            self._save += 1
            verdict = self._try(snapshot, self._save, try_number)
            if verdict["code"] is not None:
                raise SaveError(verdict["say"], verdict["code"])
            if verdict["say"] and self._together.rank == 0:
                self._say(verdict["say"])
            if verdict["committed"]:
                self.committed, self._given_up = CheckpointName(snapshot.step, self._attempt_name, self._save), 0
                self.commit_s = time.monotonic() - snapshot.started
                return self.committed
            if verdict["retry_s"] is None:
                break
            self._pause(verdict["retry_s"])
        self._given_up += 1
        if self._given_up == GIVEN_UP_IN_A_ROW and not self._hurried.is_set():
            raise SaveError(f"{GIVEN_UP_IN_A_ROW} saves in a row failed: {verdict['say']}", EXIT_FAILED)
        return None

    def _pause(self, seconds: float) -> None:
        """Give the bucket time, unless somebody is in a hurry."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (self._hurried.is_set() or self._heard.is_set()):
            time.sleep(0.05)

    def _try(self, snapshot: Snapshot, save: int, try_number: int) -> dict[str, Any]:
        """Write this rank's share into a new folder and learn what becomes of the save."""
        assert self._attempt_name
        rank, key = self._together.rank, f"save/{save}"
        name = CheckpointName(snapshot.step, self._attempt_name, save)
        folder = self._paths.checkpoint(name)
        with self._together.beating(f"beat/{key}/{rank}"):
            word: dict[str, Any] = {}
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if rank == 0:
                    checkpoint.at_point("folder-made")
                written = checkpoint.write_share(folder / checkpoint.share_name(rank), snapshot.share)
                if rank == 0:
                    checkpoint.at_point("share-written")
                word = {"bytes": written.bytes, "hash": written.hash}
            except OSError as error:
                word = {"error": describe(error, folder), "code": fatal_code(error)}
            self._store.set(f"{key}/share/{rank}", json.dumps(word))
            if rank:
                verdict: dict[str, Any] = self._await(f"{key}/verdict", f"beat/{key}/0")
                return verdict
            words = [
                self._await(f"{key}/share/{other}", f"beat/{key}/{other}") for other in range(self._together.world_size)
            ]
            verdict = self._commit(snapshot, folder, words, try_number)
            self._store.set(f"{key}/verdict", json.dumps(verdict))
            return verdict

    def _await(self, key: str, beat: str) -> Any:
        """A JSON value from the store, for as long as its writer's heart beats."""
        last, changed = b"", time.monotonic()
        while not wait_for(self._store, key, BEAT_S):
            if self._store.check([beat]) and (now := self._store.get(beat)) != last:
                last, changed = now, time.monotonic()
            if time.monotonic() - changed > self._together.timeout_s:
                raise PeerGoneError(f"no word of {key!r} for {self._together.timeout_s:g} s")
        return json.loads(self._store.get(key))

    def _commit(self, snapshot: Snapshot, folder: Path, words: list[dict[str, Any]], try_number: int) -> dict[str, Any]:
        """Rank 0: with every rank's word, write what makes the folder count; or say what to do instead."""
        assert snapshot.plain is not None
        assert snapshot.facts is not None
        assert self._records
        failed = [word for word in words if "error" in word]
        if not failed:
            try:
                files = {
                    checkpoint.share_name(rank): FileRecord(word["bytes"], word["hash"])
                    for rank, word in enumerate(words)
                }
                files[STATE] = checkpoint.write_state(folder, snapshot.plain)
                checkpoint.at_point("state-written")
                newer = newer_attempt(self._attempt) if self._attempt else None
                if newer:
                    return {
                        "committed": False,
                        "retry_s": None,
                        "code": EXIT_SUPERSEDED,
                        "say": superseded(newer),
                    }
                history = self._records.history_until(snapshot.step).result()
                facts = {**snapshot.facts, "metrics": history}
                checkpoint.write_manifest(folder, Manifest("checkpoint", files, facts))
                return {"committed": True, "retry_s": None, "code": None, "say": ""}
            except OSError as error:
                failed = [{"error": describe(error, folder), "code": fatal_code(error)}]
        code = next((word["code"] for word in failed if word["code"] is not None), None)
        say = f"the checkpoint of step {snapshot.step} could not be written: {failed[0]['error']}"
        retry_s = 0.5 * 2**try_number
        late = time.monotonic() + retry_s > self._deadline or (self._hurried.is_set() and not snapshot.last)
        if code is not None or try_number == TRIES - 1 or late:
            return {"committed": False, "retry_s": None, "code": code, "say": say}
        return {"committed": False, "retry_s": retry_s, "code": None, "say": f"{say}; trying again in {retry_s:g} s"}

    def _after_commit(self, snapshot: Snapshot, name: CheckpointName) -> None:
        """Rank 0: record the save, read it back, and prune behind it. Nothing here can undo the commit."""
        assert self._attempt
        try:
            folder = self._paths.checkpoint(name)
            manifest = read_manifest(folder)
            record(
                self._attempt,
                "saved",
                step=snapshot.step,
                checkpoint=str(name),
                bytes=manifest.total_bytes,
                stall_s=round(snapshot.stall_s, 4),
                commit_s=round(self.commit_s or 0.0, 4),
            )
            # Under a deadline every second belongs to leaving in time; and one read-back at a time is enough.
            if not self.prunes or self._hurried.is_set() or not self._reading_back.acquire(blocking=False):
                return
            try:
                if problem(folder, manifest) is None:
                    self._whole.add(name)
                    prune(self._paths, self._whole, self._keep_latest)
            finally:
                self._reading_back.release()
        except (OSError, LayoutError) as error:
            self._say(f"after the checkpoint of step {snapshot.step}: {error}")


def prune(paths: RunPaths, whole: set[CheckpointName], keep_latest: int) -> None:
    """Delete committed checkpoints that are older than the `keep_latest` newest of those known to be whole.

    A checkpoint is deleted only behind at least two whole ones; its manifest goes first, so that what is left of it
    after an interruption does not count. So does what an earlier preemption has left half written.
    """
    kept = sorted(whole, reverse=True)[: max(2, keep_latest)]
    if len(kept) < max(2, keep_latest):
        return
    for name in list_checkpoints(paths):
        folder = paths.checkpoint(name)
        if name < kept[-1]:
            (folder / MANIFEST).unlink(missing_ok=True)
            for file in sorted(folder.iterdir()):
                file.unlink()
            folder.rmdir()
            whole.discard(name)


def _is_fuse(path: Path) -> bool:
    """Whether the folder lies on a FUSE mount; there a read-back may come from a cache and proves nothing."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    best, kind = "", ""
    resolved = str(path.resolve())
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode().decode("unicode_escape")
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split(" ")[0]
    return kind.startswith("fuse")
