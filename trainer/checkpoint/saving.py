"""The Saver: writes a boundary's state into the bucket in the background, from a copy in host memory.

Each rank has one save in flight at a time, on a thread. The ranks report their shares to rank 0 through the store,
never through a directory listing. Rank 0 alone decides (commit.py): the save is committed, tried again in a new folder,
or given up; all ranks follow.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from trainer.attempt.record import Attempt, record
from trainer.bucket.deadlines import read_manifest, within
from trainer.bucket.hashing import fingerprint
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.commit import MetricsHistory, StopDeadline, Verdict, commit
from trainer.checkpoint.errors import BucketError, SaveError
from trainer.checkpoint.finite import NotFiniteError
from trainer.checkpoint.pruning import Pruner
from trainer.checkpoint.shards import Part, deal, parts_of
from trainer.checkpoint.share_report import ShareReport, write_share
from trainer.checkpoint.staging import Copy, Staging
from trainer.checkpoint.state import State, StateError
from trainer.layout.documents import LayoutError
from trainer.layout.exit_codes import EXIT_FAILED
from trainer.layout.names import AttemptName, CheckpointName, RunPaths
from trainer.machine.flag import Flag
from trainer.ranks.group import RankGroup


@dataclass
class SavePolicy:
    """The number of checkpoints that a run keeps, and of failed saves that it tolerates."""

    latest: int = 3
    """The newest checkpoints to keep."""
    every: int = 0
    """Keep the first checkpoint at or after each multiple of so many steps for good; 0: none."""
    failures: int = 3
    """End the attempt after so many failed saves in a row."""


class Saver:
    """This rank's writer of checkpoints.

    A save is over for training once it is decided: committed, or given up. The rest of rank 0's work (the record, the
    read-back, the pruning) goes on in the background, and a stop does not wait for it.
    """

    held_s = 0.0
    """Seconds that the training thread has waited for saves, in all."""

    def __init__(
        self,
        group: RankGroup,
        paths: RunPaths,
        attempt: Attempt | None,
        records: MetricsHistory | None,
        policy: SavePolicy,
        print_line: Callable[[str], None],
        stop_requested: Flag,
    ) -> None:
        """Make a writer that has written nothing yet.

        Args:
            group: This rank's connection to the others.
            paths: The run's.
            attempt: Rank 0's attempt; None on other ranks.
            records: Rank 0's metrics; None on other ranks.
            policy: How many checkpoints to keep, and how many failures to tolerate.
            print_line: Prints a line.
            stop_requested: Set once this rank knows that it has to stop; from then on no wait is long.
        """
        self.committed: CheckpointName | None = None
        """The newest committed checkpoint."""
        self.finite: CheckpointName | None = None
        """The newest committed checkpoint with finite weights."""
        self.commit_s: float | None = None
        """Seconds from the boundary to the commit, of the last save."""
        self.stall_s = 0.0
        """Seconds that the training thread has waited for the save that began last."""
        self.begun_s = 0.0
        """The part of `stall_s` spent at the boundary."""
        self.waited_s = 0.0
        """Seconds that the training thread waited for the previous save."""
        self._group, self._paths, self._attempt, self._records = group, paths, attempt, records
        self._store: Any = group.connection()  # Opened here: no save has to wait for a new connection.
        self._attempt_name = attempt.name if attempt else None
        self._failures = policy.failures
        self._print_line = print_line
        self._save = 0
        """The number of the last save of this attempt."""
        self._given_up = 0
        """Saves given up in a row."""
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        """The threads of the last save, and of earlier ones that still verify or prune."""
        self._decided = threading.Event()
        self._stop_requested, self._stop = stop_requested, StopDeadline()
        self._begun = 0.0
        self._staging = Staging()
        self._copy: Copy | None = None
        self._staged = True
        """All ranks have memory for their copies. If not, training waits until each save is decided."""
        self._dealt: tuple[int, list[list[Part]]] | None = None
        """(fingerprint of the parts, shares of all ranks)."""
        self._at_once = False
        """A tensor changed while it was copied beside training; from then on training waits for the copy."""
        self._printed_short = False
        self._spoilt = ""
        """A tensor of the newest checkpoint that is not finite; empty if all are finite."""
        self._pruner = Pruner(paths, attempt, policy.latest, policy.every, group.world_size, print_line)

    def adopt(
        self,
        attempt_name: str,
        restored: CheckpointName | None,
        finite: bool = True,
        rejected: Iterable[CheckpointName] = (),
    ) -> None:
        """Take the attempt's name, as rank 0 chose it, and what the restore found whole (one) and not whole."""
        self._attempt_name = AttemptName.parse(attempt_name)
        self._pruner.attempt_name = self._attempt_name
        self._pruner.rejected(rejected)
        if restored:
            self.committed = restored
            self.finite = restored if finite else None
            self._pruner.restored(restored, finite)

    @property
    def committed_step(self) -> int | None:
        """The step of the newest checkpoint: of this attempt, or the one that it resumed from."""
        return self.committed.step if self.committed else None

    def hurry(self, deadline: float) -> None:
        """All ranks have agreed to stop by then (monotonic seconds): an older boundary's save is not tried again."""
        self._stop.agree(deadline)

    @property
    def trouble(self) -> BucketError | NotFiniteError | None:
        """The error that the attempt ends with. All ranks know it; others may leave before this one has looked."""
        return self._error if isinstance(self._error, (BucketError, NotFiniteError)) else None

    @property
    def idle(self) -> bool:
        """True if no save is under way."""
        return not self._threads or self._decided.is_set()

    @property
    def save_s(self) -> float:
        """Seconds that a save takes, by the last one and the one under way; 0 before the first."""
        so_far = 0.0 if self.idle else time.monotonic() - self._begun
        return max(self.commit_s or 0.0, so_far)

    def start(self, collect: Callable[[], Boundary]) -> None:
        """Begin to save a boundary; waits first for a save that is still under way.

        After it returns, training may go on up to the optimizer's next step; then it has to call `await_copied`.

        Args:
            collect: Returns the boundary; its time counts as a part of the save's.

        Raises:
            StateError: the ranks' states differ in their tensors.
            SaveError: the attempt cannot go on.
        """
        begun = time.monotonic()
        self.wait()
        self.waited_s = time.monotonic() - begun
        self._begun = time.monotonic()
        boundary = collect()
        self._copy = self._staging.begin(self._agree(boundary.state), boundary.state.tensors, boundary.state.steady)
        self._decided.clear()
        thread = threading.Thread(target=self._work, args=(boundary, self._copy), daemon=True, name="save")
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()
        if self._at_once:
            self._copy.copied.wait()
        if not self._staged:
            self.wait(None if self._stop.at == math.inf else max(0.1, self._stop.at - time.monotonic()))
        self.stall_s = self.begun_s = time.monotonic() - self._begun
        self.held_s += self.waited_s + self.begun_s

    def await_copied(self) -> None:
        """Wait until the tensors of the boundary that is being saved may change."""
        if self._copy is not None and not self._copy.copied.is_set():
            begun = time.monotonic()
            self._copy.copied.wait()
            self.stall_s += (waited_s := time.monotonic() - begun)
            self.held_s += waited_s

    def prepare(self, state: State) -> None:
        """Get memory for copies before the first save needs it: the system clears fresh memory, which takes time.

        Every rank calls it at the same step, with a state as it will be saved.

        Raises:
            StateError: the ranks' states differ in their tensors.
        """
        self._agree(state)
        threading.Thread(target=self._staging.populate, daemon=True, name="memory").start()

    def _agree(self, state: State) -> list[Part]:
        """Agree with the other ranks on the parts to save, and on memory for a copy; returns this rank's share."""
        rank, ranks = self._group.rank, self._group.world_size
        parts = parts_of(state.tensors, ranks, state.buffers)
        form = fingerprint(*(f"{part.name}{part.dtype}{part.shape}{part.offsets}{part.sizes}" for part in parts))
        if self._dealt is None or self._dealt[0] != form:
            self._dealt = form, deal(parts, ranks)
        mine = self._dealt[1][rank]
        here = range(rank - self._group.local_rank, rank - self._group.local_rank + self._group.local_world_size)
        needed = sum(part.bytes for other in here for part in self._dealt[1][other])
        holds = self._staging.holds(mine)
        # All ranks look for room before any rank allocates its part.
        rows = self._group.exchange([form, int(holds), int(holds or self._staging.has_room(needed))]).wait()
        if any(row[0] != form for row in rows):
            raise StateError(
                "the ranks' states differ: the saved tensors must have the same names, shapes and types on every rank"
            )
        self._staged = all(row[2] for row in rows)
        if self._staged and not all(row[1] for row in rows):
            got = self._group.exchange([int(holds or self._staging.allocate(mine))]).wait()
            self._staged = all(row[0] for row in got)
        if not self._staged:
            self._staging.drop()
            if rank == 0 and not self._printed_short:
                self._printed_short = True
                needed_gb = sum(part.bytes for part in parts) / 1e9
                self._print_line(f"Not enough memory to stage {needed_gb:.1f} GB of state; saving synchronously.")
        return mine

    def check(self) -> None:
        """Raise the error of the background threads, if there is one.

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

    def await_record(self, seconds: float) -> None:
        """Rank 0: wait for the record of the last save, for so many seconds at most; the checkpoint counts without."""
        if self._group.rank == 0 and self._threads:
            self._threads[-1].join(max(0.0, seconds))

    def settle(self, at_end: bool = False) -> None:
        """Rank 0: wait for the records, read-backs and pruning of all saves, or until a stop is requested.

        Args:
            at_end: No save follows in this run: prune once more, as of `Pruner.finish`.
        """
        if at_end and self._group.rank == 0 and not self._stop_requested.is_set():
            others = list(self._threads)
            self._threads.append(threading.Thread(target=self._finish, args=(others,), daemon=True, name="save"))
            self._threads[-1].start()
        for thread in self._threads if self._group.rank == 0 else ():
            while thread.is_alive() and not self._stop_requested.is_set():
                thread.join(0.05)

    def _finish(self, others: list[threading.Thread]) -> None:
        for thread in others:
            thread.join()
        try:
            self._pruner.finish(self._store)
        except (OSError, LayoutError) as error:
            self._print_line(f"The run is saved, but reading checkpoints back or pruning failed: {error}")

    def _work(self, boundary: Boundary, copy: Copy) -> None:
        try:
            copy.run()
            name = self._write(boundary, copy)
            if name and boundary.spoilt_ends and self.finite != name:
                self._error = NotFiniteError(self._not_finite_message(boundary))
        except BaseException as error:
            self._error = error
            name = None
        finally:
            self._decided.set()
        if name:
            self._after_commit(boundary, name)

    def _write(self, boundary: Boundary, copy: Copy) -> CheckpointName | None:
        """Write a boundary, in as many tries as it takes; the committed checkpoint's name, None if it is given up.

        Raises:
            SaveError: the attempt cannot go on.
        """
        assert self._attempt_name
        for try_number in itertools.count():
            self._save += 1
            verdict = self._try(boundary, copy, self._save, try_number)
            if verdict.code is not None:
                raise SaveError(verdict.message, verdict.code)
            if verdict.message and self._group.rank == 0:
                self._print_line(verdict.message)
            self._at_once = self._at_once or verdict.torn
            if verdict.committed:
                self.committed, self._given_up = CheckpointName(boundary.step, self._attempt_name, self._save), 0
                self._spoilt = verdict.spoilt
                if not self._spoilt:
                    self.finite = self.committed
                self.commit_s = time.monotonic() - self._begun
                return self.committed
            if verdict.torn:
                return None  # The bucket did not fail; from now on training waits for each copy.
            if verdict.retry_s is None:
                break
            self._pause(verdict.retry_s, boundary.last)
        self._given_up += 1
        if self._given_up >= self._failures and not self._stop.agreed.is_set():
            raise SaveError(f"{self._given_up} saves in a row failed: {verdict.message}", EXIT_FAILED)
        return None

    def _not_finite_message(self, boundary: Boundary) -> str:
        """The error for a checkpoint that is not finite."""
        remedy = f". {boundary.spoilt_remedy}" if boundary.spoilt_remedy else ""
        return (
            f"step {boundary.step}: {self._spoilt} is not finite (NaN or infinite). {self.last_finite()}; a relaunch "
            f"resumes there{remedy}"
        )

    def last_finite(self) -> str:
        """A sentence that names the newest checkpoint with finite weights."""
        return f"The last finite checkpoint is {self.finite}" if self.finite else "No finite checkpoint is committed"

    def _pause(self, seconds: float, last: bool) -> None:
        """Give the bucket time; once a stop is requested, only for the attempt's last save."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (last or not (self._stop.agreed.is_set() or self._stop_requested.is_set())):
            time.sleep(0.05)

    def _try(self, boundary: Boundary, copy: Copy, save: int, try_number: int) -> Verdict:
        """Write this rank's share into a new folder, report it to rank 0, and wait for the verdict."""
        assert self._attempt_name
        rank, key = self._group.rank, f"save/{save}"
        folder = self._paths.checkpoint(CheckpointName(boundary.step, self._attempt_name, save))
        with self._group.heartbeat(f"beat/{key}/{rank}"):
            report = write_share(folder, rank, boundary, copy, past_cache=self._pruner.on_disk)
            self._store.set(f"{key}/share/{rank}", report.to_json())
            if rank:
                return Verdict(**self._await(f"{key}/verdict", f"beat/{key}/0"))
            reports = [
                ShareReport(**self._await(f"{key}/share/{other}", f"beat/{key}/{other}"))
                for other in range(self._group.world_size)
            ]
            # A rank that has reported its share of this save has read the verdict on the previous one.
            for read in (*(f"{key}/share/{other}" for other in range(len(reports))), f"save/{save - 1}/verdict"):
                self._store.delete_key(read)
            assert self._records
            verdict = commit(boundary, folder, reports, try_number, self._attempt, self._records, self._stop)
            self._store.set(f"{key}/verdict", verdict.to_json())
            return verdict

    def _await(self, key: str, beat: str) -> Any:
        return self._group.await_value(key, beat, store=self._store)

    def _after_commit(self, boundary: Boundary, name: CheckpointName) -> None:
        """Record the save, see whether it is in the store, and prune older ones. Nothing here undoes the commit."""
        try:
            if self._group.rank:
                self._pruner.report(name, self._group.rank, self._store, self._stop.agreed)
                return
            assert self._attempt
            manifest = read_manifest(self._paths.checkpoint(name))
            self._record(boundary.step, name, manifest.total_bytes)
            # Under a deadline every second belongs to leaving in time.
            if not self._stop.agreed.is_set():
                self._pruner.committed(name, manifest, self._store, self._stop.agreed)
        except (OSError, LayoutError) as error:
            self._print_line(f"Step {boundary.step} is committed, but reading it back or pruning failed: {error}")

    def _record(self, step: int, name: CheckpointName, count: int) -> None:
        """Record a save; the checkpoint counts without the record too."""
        assert self._attempt
        try:
            with within("recording a save"):
                record(
                    self._attempt, "saved", step=step, checkpoint=str(name), bytes=count,
                    stall_s=round(self.stall_s, 4), commit_s=round(self.commit_s or 0.0, 4),
                )  # fmt: skip
        except OSError as error:
            self._print_line(f"The checkpoint of step {step} could not be recorded: {error}")
