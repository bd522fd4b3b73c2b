"""The commit protocol: from a snapshot in host memory to a committed checkpoint, in the background.

One save is in flight at a time, on a thread of each rank. The ranks tell rank 0 what they wrote through the store,
never through a directory listing; rank 0 alone decides whether the save is committed, tried again in a new folder, or
given up, and all ranks follow.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from trainer.attempt.record import Attempt, newer_attempt, record, superseded
from trainer.bucket.deadlines import read_manifest, within
from trainer.bucket.hashing import fingerprint
from trainer.bucket.retry import MOUNT_GONE, REFUSED
from trainer.checkpoint import writing
from trainer.checkpoint.finite import NotFiniteError, is_spoilt
from trainer.checkpoint.pruning import Pruner
from trainer.checkpoint.shards import Part, deal, parts_of
from trainer.checkpoint.staging import Copy, Staging
from trainer.checkpoint.state import State, StateError
from trainer.errors import TrainerError
from trainer.layout.documents import LayoutError
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED, EXIT_SUPERSEDED
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import STATE, AttemptName, CheckpointName, RunPaths
from trainer.machine.scratch import FULL
from trainer.ranks.group import RankGroup
from trainer.ranks.heartbeat import BEAT_S
from trainer.ranks.peers import PeerGoneError
from trainer.ranks.store import peek, wait_for

TRIES = 6
FIRST_RETRY_S = 0.5


class MetricsHistory(Protocol):
    """Rank 0's record of metrics, as far as a checkpoint lists its files."""

    def history_until(self, step: int) -> Future[list[dict[str, Any]]]:
        """The closed files of metrics up to a step."""


class BucketError(TrainerError):
    """The bucket fails; the attempt ends with `code`."""


class SaveError(BucketError):
    """The bucket cannot be written."""


def fatal_code(error: OSError) -> int | None:
    """The exit code that a failed write ends the attempt with at once; None where it is worth another try."""
    if error.errno in FULL | REFUSED:
        return EXIT_FAILED
    return EXIT_PREEMPTED if error.errno in MOUNT_GONE else None


def describe(error: OSError, where: Path) -> str:
    """What, where and the remedy, in a line."""
    reason = f"{where}: {error.strerror or error}"
    if error.errno in FULL:
        return f"{reason}. Make room there, or name another bucket; nothing that was committed is lost."
    if error.errno in REFUSED:
        return f"{reason}. Give this machine the right to write there; nothing that was committed is lost."
    return reason


@dataclass
class Boundary:
    """What is to be saved: a run's state between two steps."""

    step: int
    samples: int
    state: State
    """The live tensors. What is `steady` of them may be copied until `Saver.await_copied` returns."""
    own: dict[str, torch.Tensor]
    """Small tensors of this rank alone, on the host."""
    plain: dict[str, Any] | None
    """Rank 0's: what goes into state.json."""
    facts: dict[str, Any] | None
    """Rank 0's: what the manifest says besides."""
    last: bool = False
    """The attempt ends with it: it is tried again even in a hurry."""
    watched: frozenset[str] = frozenset()
    """Names of the tensors that make the checkpoint one that is not finite where they hold NaN or infinite values."""
    spoilt_ends: bool = False
    """The attempt ends where the checkpoint is not finite."""


@dataclass
class Keeping:
    """What is kept of a run's checkpoints, and how much trouble is borne."""

    latest: int = 3
    every: int = 0
    failures: int = 3


class Saver:
    """This rank's writer of checkpoints.

    A save is over for the training once it is decided: committed, or given up. What follows on rank 0 (the record, the
    read-back, the pruning) goes on beside, and a stop does not wait for it.
    """

    def __init__(
        self,
        group: RankGroup,
        paths: RunPaths,
        attempt: Attempt | None,
        records: MetricsHistory | None,
        keeping: Keeping,
        say: Callable[[str], None],
        heard: threading.Event,
    ) -> None:
        """Make a writer that has written nothing yet.

        Args:
            group: This rank's seat.
            paths: The run's.
            attempt: Rank 0's.
            records: Rank 0's.
            keeping: What is kept, and how much trouble is borne.
            say: Prints a line.
            heard: Set once this rank has heard that it has to stop: no wait is long from then on.
        """
        self.committed: CheckpointName | None = None
        self.finite: CheckpointName | None = None
        """The newest of them whose weights are finite."""
        self.commit_s: float | None = None
        """Seconds from the boundary to the commit, of the last save."""
        self.stall_s = 0.0
        """Seconds that the training thread has waited for the save that was begun last."""
        self.begun_s = 0.0
        """The part of them that it waited at the boundary."""
        self.waited_s = 0.0
        """Seconds that it waited for the save before that one."""
        self._group, self._paths, self._attempt, self._records = group, paths, attempt, records
        self._store: Any = group.connection()  # Here: no save shall wait for what a connection may take.
        self._attempt_name = attempt.name if attempt else None
        self._failures = keeping.failures
        self._say = say
        self._save = 0
        self._given_up = 0
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        """Of the last save, and of those before it whose checkpoints are still looked after."""
        self._decided = threading.Event()
        self._heard, self._hurried = heard, threading.Event()
        self._deadline = math.inf
        """Of the agreed stop (monotonic seconds): no further try starts after it."""
        self._begun = 0.0
        self._staging = Staging()
        self._copy: Copy | None = None
        self._staged = True
        """Whether all ranks have memory for their copies: else all wait until a save is decided."""
        self._dealt: tuple[int, list[list[Part]]] | None = None
        """(fingerprint of the parts, shares of all ranks)."""
        self._at_once = False
        """A tensor was changed while it was copied beside the training: from then on training waits for the copy."""
        self._said_short = False
        self._spoilt = ""
        """A tensor of the newest checkpoint that is not finite; empty where all are."""
        self._pruner = Pruner(paths, attempt, keeping.latest, keeping.every, group.world_size, say)

    def adopt(self, attempt_name: str, restored: CheckpointName | None, finite: bool = True) -> None:
        """Learn the attempt's name (rank 0's word) and which checkpoint was found whole at the restore."""
        self._attempt_name = AttemptName.parse(attempt_name)
        self._pruner.attempt_name = self._attempt_name
        if restored:
            self.committed = restored
            self.finite = restored if finite else None
            self._pruner.restored(restored, finite)

    @property
    def committed_step(self) -> int | None:
        """The step of the newest checkpoint of this attempt, or of the one that it resumed from."""
        return self.committed.step if self.committed else None

    def hurry(self, deadline: float) -> None:
        """All ranks have agreed to stop by then (monotonic seconds): an older boundary's save is not tried again."""
        self._deadline = min(self._deadline, deadline)
        self._hurried.set()

    @property
    def trouble(self) -> BucketError | NotFiniteError | None:
        """What the attempt ends with, known to all ranks; the others may leave for it before this one has looked."""
        return self._error if isinstance(self._error, (BucketError, NotFiniteError)) else None

    @property
    def idle(self) -> bool:
        """Whether no save is under way."""
        return not self._threads or self._decided.is_set()

    def start(self, boundary: Boundary) -> None:
        """Begin to save a boundary; waits first for a save that is still under way.

        Training may go on when this returns, up to the optimizer's next step: then `await_copied`.

        Raises:
            StateError: the ranks' states are not made of the same tensors.
            SaveError: the attempt cannot go on.
        """
        begun = time.monotonic()
        self.wait()
        self.waited_s = time.monotonic() - begun
        self._begun = time.monotonic()
        self._copy = self._begin_copy(boundary.state)
        self._decided.clear()
        thread = threading.Thread(target=self._work, args=(boundary, self._copy), daemon=True, name="save")
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()
        if self._at_once:
            self._copy.copied.wait()
        if not self._staged:
            self.wait(None if self._deadline == math.inf else max(0.1, self._deadline - time.monotonic()))
        self.stall_s = self.begun_s = time.monotonic() - self._begun

    def await_copied(self) -> None:
        """Wait until the tensors of the boundary that is being saved may change."""
        if self._copy is not None and not self._copy.copied.is_set():
            begun = time.monotonic()
            self._copy.copied.wait()
            self.stall_s += time.monotonic() - begun

    def prepare(self, state: State) -> None:
        """Have memory for copies before the first save needs it: the system clears what it has not given out yet.

        Every rank calls it at the same step, with a state as it will be saved.

        Raises:
            StateError: the ranks' states are not made of the same tensors.
        """
        self._agree(state)
        threading.Thread(target=self._staging.populate, daemon=True, name="memory").start()

    def _begin_copy(self, state: State) -> Copy:
        """Copy what cannot wait."""
        return self._staging.begin(self._agree(state), state.tensors, state.steady)

    def _agree(self, state: State) -> list[Part]:
        """Agree with the others on what is saved, and whether there is memory for a copy; this rank's share."""
        rank, ranks = self._group.rank, self._group.world_size
        parts = parts_of(state.tensors, ranks, state.buffers)
        form = fingerprint(*(f"{part.name}{part.dtype}{part.shape}{part.offsets}{part.sizes}" for part in parts))
        if self._dealt is None or self._dealt[0] != form:
            self._dealt = form, deal(parts, ranks)
        mine = self._dealt[1][rank]
        here = range(rank - self._group.local_rank, rank - self._group.local_rank + self._group.local_world_size)
        needed = sum(part.bytes for other in here for part in self._dealt[1][other])
        holds = self._staging.holds(mine)
        # Whether there is room for all is asked before any rank takes its part of it.
        rows = self._group.exchange([form, int(holds), int(holds or self._staging.has_room(needed))]).wait()
        if any(row[0] != form for row in rows):
            raise StateError(
                "the ranks' states are not made of the same tensors: what is saved must have the same names, shapes "
                "and types on every rank"
            )
        self._staged = all(row[2] for row in rows)
        if self._staged and not all(row[1] for row in rows):
            got = self._group.exchange([int(holds or self._staging.allocate(mine))]).wait()
            self._staged = all(row[0] for row in got)
        if not self._staged:
            self._staging.drop()
            if rank == 0 and not self._said_short:
                self._said_short = True
                self._say(
                    f"no memory to copy {sum(part.bytes for part in parts) / 1e9:.1f} GB of state to: training waits "
                    "while a checkpoint is written"
                )
        return mine

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
        if self._threads:
            self._decided.wait(seconds)
        self.check()

    def settle(self) -> None:
        """Rank 0: wait until all that follows the saves is done too, or a stop is heard."""
        for thread in self._threads if self._group.rank == 0 else ():
            while thread.is_alive() and not self._heard.is_set():
                thread.join(0.05)

    def _work(self, boundary: Boundary, copy: Copy) -> None:
        try:
            copy.run()
            name = self._write(boundary, copy)
            if name and boundary.spoilt_ends and self.finite != name:
                self._error = NotFiniteError(self._spoilt_says(boundary.step))
        except BaseException as error:
            self._error = error
            name = None
        finally:
            self._decided.set()
        if name:
            self._after_commit(boundary, name)

    def _write(self, boundary: Boundary, copy: Copy) -> CheckpointName | None:
        """Write a boundary, in as many tries as it takes; the name of what is committed, None where it is given up.

        Raises:
            SaveError: the attempt cannot go on.
        """
        assert self._attempt_name
        for try_number in itertools.count():
            self._save += 1
            verdict = self._try(boundary, copy, self._save, try_number)
            if verdict["code"] is not None:
                raise SaveError(verdict["say"], verdict["code"])
            if verdict["say"] and self._group.rank == 0:
                self._say(verdict["say"])
            self._at_once = self._at_once or verdict["torn"]
            if verdict["committed"]:
                self.committed, self._given_up = CheckpointName(boundary.step, self._attempt_name, self._save), 0
                self._spoilt = verdict["spoilt"]
                if not self._spoilt:
                    self.finite = self.committed
                self.commit_s = time.monotonic() - self._begun
                return self.committed
            if verdict["torn"]:
                return None  # No fault of the bucket's; from now on nothing is copied beside training.
            if verdict["retry_s"] is None:
                break
            self._pause(verdict["retry_s"], boundary.last)
        self._given_up += 1
        if self._given_up >= self._failures and not self._hurried.is_set():
            raise SaveError(f"{self._given_up} saves in a row failed: {verdict['say']}", EXIT_FAILED)
        return None

    def _spoilt_says(self, step: int) -> str:
        """What is said of a checkpoint that is not finite though the losses and gradients up to it were."""
        return (
            f"step {step}: {self._spoilt} is not finite (NaN or infinite), though losses and gradients are. "
            f"{self.last_finite()}. To train on all the same: --on-nan ignore"
        )

    def last_finite(self) -> str:
        """A sentence that names the newest checkpoint whose weights are finite."""
        return f"The last finite checkpoint is {self.finite}" if self.finite else "No finite checkpoint is committed"

    def _pause(self, seconds: float, last: bool) -> None:
        """Give the bucket time; somebody in a hurry waits for the attempt's last save alone."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (last or not (self._hurried.is_set() or self._heard.is_set())):
            time.sleep(0.05)

    def _try(self, boundary: Boundary, copy: Copy, save: int, try_number: int) -> dict[str, Any]:
        """Write this rank's share into a new folder and learn what becomes of the save."""
        assert self._attempt_name
        rank, key = self._group.rank, f"save/{save}"
        name = CheckpointName(boundary.step, self._attempt_name, save)
        folder = self._paths.checkpoint(name)
        with self._group.heartbeat(f"beat/{key}/{rank}"):
            word: dict[str, Any] = {}
            try:
                with within("making a folder"):
                    folder.mkdir(parents=True, exist_ok=True)
                writing.at_point("folder-made")
                written = self._write_share(folder / writing.share_name(rank), boundary, copy)
                writing.at_point("share-written")
                spoilt = _spoilt(boundary, copy)
                word = {"bytes": written.bytes, "hash": written.hash, "torn": copy.torn, "spoilt": spoilt}
            except OSError as error:
                word = {"error": describe(error, folder), "code": fatal_code(error)}
            self._store.set(f"{key}/share/{rank}", json.dumps(word))
            if rank:
                verdict: dict[str, Any] = self._await(f"{key}/verdict", f"beat/{key}/0")
                return verdict
            words = [
                self._await(f"{key}/share/{other}", f"beat/{key}/{other}") for other in range(self._group.world_size)
            ]
            # Whoever has written its share of this save has read the verdict on the one before.
            for read in (*(f"{key}/share/{other}" for other in range(len(words))), f"save/{save - 1}/verdict"):
                self._store.delete_key(read)
            verdict = self._commit(boundary, folder, words, try_number)
            self._store.set(f"{key}/verdict", json.dumps(verdict))
            return verdict

    def _write_share(self, path: Path, boundary: Boundary, copy: Copy) -> FileRecord:
        own = [
            Part(name, tensor.dtype, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape), (self._group.rank,))
            for name, tensor in boundary.own.items()
        ]
        parts = [*copy.parts, *own]
        side_by_side = writing.in_order(parts)[: len(copy.parts)] == copy.parts  # Nothing of its own in between.
        return writing.write_share(
            path,
            parts,
            lambda part: boundary.own[part.name] if part.name in boundary.own else copy.fetch(part),
            copy.memory if side_by_side and self._pruner.on_disk else None,
        )

    def _await(self, key: str, beat: str) -> Any:
        """A JSON value from the store, for as long as its writer's heart beats."""
        last, changed = b"", time.monotonic()
        while not wait_for(self._store, key, BEAT_S):
            if (now := peek(self._store, beat)) not in (b"", last):
                last, changed = now, time.monotonic()
            if time.monotonic() - changed > self._group.timeout_s:
                raise PeerGoneError(f"no word of {key!r} for {self._group.timeout_s:g} s")
        return json.loads(self._store.get(key))

    def _commit(self, boundary: Boundary, folder: Path, words: list[dict[str, Any]], try_number: int) -> dict[str, Any]:
        """Rank 0: with every rank's word, write what makes the folder count; or say what to do instead."""
        assert boundary.plain is not None
        assert boundary.facts is not None
        assert self._records
        verdict = {"committed": False, "retry_s": None, "code": None, "say": "", "torn": False, "spoilt": ""}
        torn = next((word["torn"] for word in words if word.get("torn")), None)
        if torn:
            say = (
                f"{torn} was changed between two optimizer steps while the state was copied: the checkpoint of step "
                f"{boundary.step} is dropped, and training waits for the copy from now on"
            )
            return {**verdict, "torn": True, "say": say}
        failed = [word for word in words if "error" in word]
        if not failed:
            try:
                files = {
                    writing.share_name(rank): FileRecord(word["bytes"], word["hash"]) for rank, word in enumerate(words)
                }
                files[STATE] = writing.write_state(folder, boundary.plain)
                writing.at_point("state-written")
                with within("listing attempts"):
                    newer = newer_attempt(self._attempt) if self._attempt else None
                if newer:
                    return {**verdict, "code": EXIT_SUPERSEDED, "say": superseded(newer)}
                history = self._records.history_until(boundary.step).result()
                spoilt = next((word["spoilt"] for word in words if word["spoilt"]), "")
                facts = {**boundary.facts, "finite": not spoilt, "metrics": history}
                writing.write_manifest(folder, Manifest("checkpoint", files, facts))
                return {**verdict, "committed": True, "spoilt": spoilt}
            except OSError as error:
                failed = [{"error": describe(error, folder), "code": fatal_code(error)}]
        code = next((word["code"] for word in failed if word["code"] is not None), None)
        say = f"the checkpoint of step {boundary.step} could not be written: {failed[0]['error']}"
        retry_s = FIRST_RETRY_S * 2 ** min(try_number, TRIES)
        enough = try_number >= TRIES - 1
        if boundary.last and self._deadline < math.inf:  # What the deadline leaves belongs to this save.
            retry_s, enough = min(retry_s, 2 * FIRST_RETRY_S), False
        late = time.monotonic() + retry_s > self._deadline or (self._hurried.is_set() and not boundary.last)
        if code is not None or enough or late:
            return {**verdict, "code": code, "say": say}
        return {**verdict, "retry_s": retry_s, "say": f"{say}; trying again in {retry_s:g} s"}

    def _after_commit(self, boundary: Boundary, name: CheckpointName) -> None:
        """Record the save, learn whether it is in the store, and prune behind it. Nothing here can undo the commit."""
        try:
            if self._group.rank:
                self._pruner.report(name, self._group.rank, self._store, self._hurried)
                return
            assert self._attempt
            manifest = read_manifest(self._paths.checkpoint(name))
            self._record(boundary.step, name, manifest.total_bytes)
            # Under a deadline every second belongs to leaving in time.
            if not self._hurried.is_set():
                self._pruner.committed(name, manifest, self._store, self._hurried)
        except (OSError, LayoutError) as error:
            self._say(f"after the checkpoint of step {boundary.step}: {error}")

    def _record(self, step: int, name: CheckpointName, count: int) -> None:
        """Record a save; without the record it counts as much."""
        assert self._attempt
        try:
            with within("recording a save"):
                record(
                    self._attempt,
                    "saved",
                    step=step,
                    checkpoint=str(name),
                    bytes=count,
                    stall_s=round(self.stall_s, 4),
                    commit_s=round(self.commit_s or 0.0, 4),
                )
        except OSError as error:
            self._say(f"the checkpoint of step {step} could not be recorded: {error}")


def _spoilt(boundary: Boundary, copy: Copy) -> str:
    """The name of a tensor of this rank's share that should be finite and is not; empty where all are."""
    for part in copy.parts:
        # An optimizer may well keep an infinite value; nothing good comes of NaN.
        if part.name in boundary.watched and is_spoilt(copy.here(part), infinite=part.name.startswith("model.")):
            return part.name
    return ""
