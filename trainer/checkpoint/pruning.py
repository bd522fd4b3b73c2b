"""Pruning: finds out which checkpoints are whole in the store itself, and deletes older ones.

A bucket's mount may show a file that has not been uploaded yet: through the mount it reads back whole, but it is lost
with the machine. The proof that a file is in the store depends on the mount (mounts.py). A checkpoint counts here only
once it is proven, and a checkpoint is deleted only if two newer ones count. Rank 0 alone deletes.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from trainer.attempt.history import machines
from trainer.attempt.record import Attempt
from trainer.bucket.deadlines import read_manifest, within
from trainer.bucket.mounts import DISKS, Proof, UploadLog, mount_of
from trainer.bucket.verify import problem
from trainer.checkpoint.writing import share_name
from trainer.layout.documents import LayoutError
from trainer.layout.events import event_named, read_events
from trainer.layout.identity import belongs, is_of
from trainer.layout.manifest import Manifest
from trainer.layout.names import MANIFEST, STATE, AttemptName, CheckpointName, RunPaths, list_checkpoints
from trainer.machine.token import machine_token, process_started

DEAD_S = 600.0
"""An attempt is dead if it has changed nothing for so long while it was watched from here."""
LOOK_S = 1.0
UPLOADED_S = 3600.0
"""The time to wait for a share to reach the store; after that its checkpoint does not count."""
PRINT_EVERY = 10
"""Saves between two lines about what is kept."""


class Pruner:
    """Deletes checkpoints, by what this attempt knows of the store."""

    def __init__(
        self,
        paths: RunPaths,
        attempt: Attempt | None,
        keep_latest: int,
        keep_every: int,
        ranks: int,
        print_line: Callable[[str], None],
    ) -> None:
        """Begin with nothing known.

        Args:
            paths: The run's.
            attempt: Rank 0's; None on other ranks.
            keep_latest: How many counting checkpoints are kept; at least 2.
            keep_every: Keep the first checkpoint at or after each multiple of so many steps for good; 0: none.
            ranks: The number of ranks, each of which writes a share.
            print_line: Prints a line.
        """
        self.attempt_name = attempt.name if attempt else None
        self._paths, self._attempt, self._ranks, self._print_line = paths, attempt, ranks, print_line
        self._keep_latest, self._keep_every = max(2, keep_latest), keep_every
        self._mount = mount_of(paths.root)
        self.on_disk = self._mount.kind in DISKS
        """True if the run's folder lies on a disk of this machine."""
        self._log = UploadLog(self._mount.log) if self._mount.proof is Proof.UPLOAD_LOG and self._mount.log else None
        self._known: set[CheckpointName] = set()
        """Checkpoints that are proven to be in the store."""
        self._spoilt: dict[CheckpointName, bool] = {}
        """True for each checkpoint whose weights are not finite, of those whose manifest was read."""
        self._doubtful: set[CheckpointName] = set()
        """Committed checkpoints that were not whole when they were read."""
        self._waiting: dict[CheckpointName, Manifest] = {}
        """Committed checkpoints whose upload is not over."""
        self._saves = self._printed_at = 0
        self._at_work = threading.Lock()
        self._todo: queue.SimpleQueue[tuple[CheckpointName, Manifest]] = queue.SimpleQueue()
        """Committed checkpoints that were not checked yet."""
        self._attempts = LiveAttempts(paths)
        self._checked_older = False

    def rejected(self, names: Iterable[CheckpointName]) -> None:
        """Take in which checkpoints the restore did not find whole."""
        self._doubtful.update(names)

    def restored(self, name: CheckpointName, finite: bool = True) -> None:
        """Take in that this attempt has read a checkpoint whole."""
        self._spoilt[name] = not finite
        with suppress(OSError):  # Then it does not count, and more checkpoints are kept.
            if self._attempt and self._proves(name):
                self._known.add(name)

    def _proves(self, name: CheckpointName) -> bool:
        """True if reading a checkpoint whole proves that it is in the store.

        Through a cache it does if another machine wrote it: the cache of this machine has never seen it.
        """
        if self._mount.proof is Proof.READ_BACK:
            return True
        try:
            with within("reading an attempt's records"):
                by = machines(read_events(self._paths, name.attempt, ("start", "machines"), all_of_them=True))
        except (LayoutError, OSError):
            return False  # This machine may have written it.
        assert self._attempt
        return "None" not in by and not by & {self._attempt.machine, machine_token()}

    def _check_older(self) -> None:
        """Read older checkpoints of other machines until enough count; needed while uploads cannot be seen."""
        self._checked_older = True
        with within("listing checkpoints"):
            names = list_checkpoints(self._paths)
        run_id = self._run_id()
        for name in names:
            if name < min(self._known) and self._proves(name):
                self._read(name, run_id)
            if len(self._known) >= self._keep_latest:
                return

    def _run_id(self) -> Any:
        """The run's id, as a checkpoint says it that counts."""
        return read_manifest(self._paths.checkpoint(max(self._known))).facts.get("run_id")

    def _read(self, name: CheckpointName, run_id: Any) -> None:
        """Read a checkpoint whole; it counts if it is one of this run, and as its manifest says."""
        with suppress(LayoutError, FileNotFoundError):
            manifest = read_manifest(self._paths.checkpoint(name))
            mine = belongs(manifest, name) and is_of(manifest, run_id)
            self._spoilt[name] = not manifest.finite
            if mine:
                trouble = problem(self._paths.checkpoint(name), manifest, self.on_disk)
                (self._doubtful if trouble else self._known).add(name)

    def report(self, name: CheckpointName, rank: int, store: Any, hurried: threading.Event) -> None:
        """Other ranks: report to rank 0 when this rank's share is in the store, if only the local mount can tell."""
        if self._log is None:
            return
        share, end = self._inside(name) / share_name(rank), time.monotonic() + UPLOADED_S
        while not self._log.has(share):
            if time.monotonic() > end or hurried.wait(LOOK_S):
                return
        store.set(_key(name, rank), "1")

    def committed(self, name: CheckpointName, manifest: Manifest, store: Any, hurried: threading.Event) -> None:
        """Rank 0, after a commit: check what is in the store by now, and prune.

        One thread at a time. If another is at work, it also checks this checkpoint when it is done.

        Raises:
            OSError: the bucket fails; the results so far stand.
        """
        self._saves += 1
        self._spoilt[name] = not manifest.finite
        self._todo.put((name, manifest))
        trouble = None
        while not self._todo.empty() and self._at_work.acquire(blocking=False):
            try:
                found: dict[CheckpointName, Manifest] = {}
                while not self._todo.empty():  # Only the thread at work takes out.
                    found.update([self._todo.get()])
                if found:
                    self._check(found, store, hurried)
            except OSError as error:  # Those that came meanwhile are checked all the same.
                trouble = trouble or error
            finally:
                self._at_work.release()
            if hurried.is_set():
                break
        if trouble:
            raise trouble

    def _check(self, committed: dict[CheckpointName, Manifest], store: Any, hurried: threading.Event) -> None:
        if self._mount.proof is Proof.READ_BACK:
            name = max(committed)  # A check reads a checkpoint whole: the newest is enough.
            trouble = problem(self._paths.checkpoint(name), committed[name], self.on_disk)
            if trouble is None:
                self._known.add(name)
            else:
                self._doubtful.add(name)
                self._print_line(f"Checkpoint {name} does not read back as it was written: {trouble}")
        elif self._known and not self._checked_older:
            self._check_older()
        self._waiting.update(committed if self._log else {})
        self._take_in_uploads(store)
        if not hurried.is_set():
            self.prune()
            kept = sorted(self._known, reverse=True)[: self._keep_latest]
            for waiting in [name for name in self._waiting if len(kept) == self._keep_latest and name < kept[-1]]:
                self._forget_waiting(waiting, store)
        if self._saves - self._printed_at >= PRINT_EVERY and self._mount.proof is Proof.NOTHING:
            self._printed_at = self._saves
            self._print_kept()

    def _take_in_uploads(self, store: Any) -> None:
        """Count the checkpoints whose upload is over by now."""
        for waiting in list(self._waiting) if self._log else ():
            if self._log and self._is_uploaded(waiting, self._log, store):
                self._known.add(waiting)
                self._forget_waiting(waiting, store)

    def finish(self, store: Any) -> None:
        """Rank 0, after a run's last save: leave no more checkpoints than are kept, as far as that can be proven.

        A check beside training reads the newest alone. Those that it has passed by go with a later save, or here: so
        many of the newest are read until as many count as are kept.

        Raises:
            OSError: the bucket fails.
        """
        with self._at_work:
            self._take_in_uploads(store)
            with within("listing checkpoints"):
                names = list_checkpoints(self._paths)
            if len(names) <= self._keep_latest or not self._known:
                return
            if self._mount.proof is Proof.READ_BACK:
                run_id, left = self._run_id(), self._keep_latest
                for name in names:
                    if left and name not in self._known | self._doubtful:
                        self._read(name, run_id)
                    left -= left > 0 and name in self._known
            self.prune()

    def _forget_waiting(self, name: CheckpointName, store: Any) -> None:
        """Stop waiting for a checkpoint's upload; the other ranks' reports of it are deleted."""
        del self._waiting[name]
        for rank in range(1, self._ranks):
            store.delete_key(_key(name, rank))

    def prune(self) -> None:
        """Delete checkpoints older than the newest that count, and older folders that dead attempts left half written.

        A checkpoint with weights that are not finite replaces only others of that kind. The manifest is deleted first:
        the rest of a checkpoint after an interruption does not count, and is deleted later.
        """
        kept = sorted(self._known, reverse=True)[: self._keep_latest]
        if len(kept) < self._keep_latest:
            return
        finite = sorted((name for name in self._known if not self._spoilt.get(name)), reverse=True)[: self._keep_latest]
        with within("listing checkpoints"):
            names = list_checkpoints(self._paths)
        trouble = None
        for_good = self._for_good(names)
        for name in names:
            if name >= kept[-1] or name in for_good:
                continue
            try:
                if (len(finite) == self._keep_latest and name < finite[-1]) or self._is_spoilt(name):
                    self._delete_if_idle(name)
            except OSError as error:  # The others are deleted all the same.
                trouble = trouble or error
        self._delete_torn_tokens()
        if trouble:
            raise trouble

    def _delete_if_idle(self, name: CheckpointName) -> None:
        """Delete an old checkpoint, unless it is half written and its attempt may be alive."""
        mine = name.attempt == self.attempt_name
        if self._is_committed(name) or mine or not self._attempts.may_write(name.attempt):
            delete(self._paths.checkpoint(name))
            self._known.discard(name)

    def _for_good(self, names: list[CheckpointName]) -> set[CheckpointName]:
        """The first checkpoint at or after each multiple of `keep_every`; of one step, the newest attempt's.

        One that was not whole when it was read counts only if its multiple has no other: it may be whole after all.
        """
        found: dict[int, CheckpointName] = {}
        in_order = sorted(names, key=lambda name: (name not in self._doubtful, -name.step, name), reverse=True)
        for name in in_order if self._keep_every else ():
            multiple = name.step // self._keep_every
            if multiple and multiple not in found and self._is_committed(name) and not self._is_spoilt(name):
                found[multiple] = name
        return set(found.values())

    def _is_committed(self, name: CheckpointName) -> bool:
        with within("looking for a manifest"):
            return (self._paths.checkpoint(name) / MANIFEST).exists()

    def _is_spoilt(self, name: CheckpointName) -> bool:
        """True if a checkpoint's manifest says that its weights are not finite."""
        if name not in self._spoilt:
            try:
                self._spoilt[name] = not read_manifest(self._paths.checkpoint(name)).finite
            except (LayoutError, FileNotFoundError):
                return False  # Not committed, or damaged; it may still be being written.
        return self._spoilt[name]

    def _delete_torn_tokens(self) -> None:
        """Delete prepared data that a dead attempt did not finish."""
        for folder in _files(self._paths.tokens):
            name = AttemptName.parse("-".join(folder.name.rsplit("-", 2)[-2:]))
            with within("looking for a manifest"):
                whole = (folder / MANIFEST).exists()
            if name and name != self.attempt_name and not whole and not self._attempts.may_write(name):
                delete(folder)

    def _inside(self, name: CheckpointName) -> PurePath:
        return self._mount.inside(self._paths.checkpoint(name))

    def _is_uploaded(self, name: CheckpointName, log: UploadLog, store: Any) -> bool:
        inside = self._inside(name)
        return all(log.has(inside / file) for file in (share_name(0), STATE, MANIFEST)) and all(
            store.check([_key(name, rank)]) for rank in range(1, self._ranks)
        )

    def _print_kept(self) -> None:
        total, count = 0, 0
        with within("listing checkpoints"):
            names = list_checkpoints(self._paths)
        for name in names:
            with suppress(LayoutError, OSError):
                total += read_manifest(self._paths.checkpoint(name)).total_bytes
                count += 1
        self._print_line(
            f"Keeping {count} checkpoints ({total / 1e9:.1f} GB) in {self._paths.checkpoints}: a mount of this kind "
            f"({self._mount.kind}) does not show what it has uploaded, so none is deleted"
        )


class LiveAttempts:
    """Tells which attempts may still be writing. No clocks are compared: an attempt that changes is alive."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._seen: dict[AttemptName, tuple[bytes, float]] = {}

    def may_write(self, name: AttemptName) -> bool:
        """True if an attempt may be alive: it has recorded no end, and is not known to be gone."""
        with within("reading an attempt's records"):
            if event_named(read_events(self._paths, name, ("end",)), "end"):
                return False
            if (seen := self._is_process_alive(name)) is not None:
                return seen
            now = b""
            with suppress(OSError):
                now = self._paths.progress(name).read_bytes()
        before, since = self._seen.get(name, (None, 0.0))
        if before != now:
            self._seen[name] = now, time.monotonic()
            return True
        return time.monotonic() - since < DEAD_S

    def _is_process_alive(self, name: AttemptName) -> bool | None:
        """True if the process of an attempt on this machine alone is alive; None if that cannot be known."""
        try:
            events = read_events(self._paths, name, ("start", "machines"), all_of_them=True)
        except (LayoutError, OSError):
            return None
        start = event_named(events, "start") or {}
        here = start.get("host") == socket.gethostname() and machines(events) == {machine_token()}
        if not here or process_started("self") is None:
            return None
        started = process_started(start.get("pid"))
        if started is None or "pid_started" not in start:
            return False if started is None else None
        return bool(started == start["pid_started"])


def delete(folder: Path) -> None:
    """Delete a folder of files, the manifest first. Another attempt may delete it too: a missing file is no error."""
    for file in [folder / MANIFEST, *_files(folder)]:
        with within("deleting a file"), suppress(FileNotFoundError):
            file.unlink()
    with within("deleting a folder"), suppress(FileNotFoundError):
        folder.rmdir()


def _files(folder: Path) -> list[Path]:
    with within("listing a folder"), suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def _key(name: CheckpointName, rank: int) -> str:
    return f"uploaded/{name}/{rank}"
