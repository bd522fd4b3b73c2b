"""Which checkpoints are known to be whole in the store itself, and the deletion of those that they make superfluous.

A bucket's mount may show a file that has not been uploaded yet: read back through the mount it is whole, and lost with
the machine all the same. What proves that a file is in the store depends on the mount (mounts.py); a checkpoint counts
here only once it is proven, and nothing is deleted but behind two that count. Rank 0 alone deletes.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
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
"""An attempt that has changed nothing for so long, watched from here, writes nothing any more."""
LOOK_S = 1.0
UPLOADED_S = 3600.0
"""A share that is not in the store after so long is waited for no more: its checkpoint does not count."""
SAY_EVERY = 10


class Pruner:
    """What this attempt knows of the checkpoints in the store."""

    def __init__(
        self,
        paths: RunPaths,
        attempt: Attempt | None,
        keep_latest: int,
        keep_every: int,
        ranks: int,
        say: Callable[[str], None],
    ) -> None:
        """Know nothing yet.

        Args:
            paths: The run's.
            attempt: Rank 0's; None on other ranks.
            keep_latest: How many of those that count are kept; 2 at least.
            keep_every: The first checkpoint at or after each multiple of so many steps is kept for good; 0: none.
            ranks: How many write shares.
            say: Prints a line.
        """
        self.attempt_name = attempt.name if attempt else None
        self._paths, self._attempt, self._ranks, self._say = paths, attempt, ranks, say
        self._keep_latest, self._keep_every = max(2, keep_latest), keep_every
        self._mount = mount_of(paths.root)
        self.on_disk = self._mount.kind in DISKS
        """Whether the run's folder lies on a disk of this machine's."""
        self._log = UploadLog(self._mount.log) if self._mount.proof is Proof.UPLOAD_LOG and self._mount.log else None
        self._known: set[CheckpointName] = set()
        self._spoilt: dict[CheckpointName, bool] = {}
        """Whether the weights of a checkpoint are not finite, as far as its manifest was read."""
        self._waiting: dict[CheckpointName, Manifest] = {}
        self._saves = self._said_at = 0
        self._at_work = threading.Lock()
        self._todo: queue.SimpleQueue[tuple[CheckpointName, Manifest]] = queue.SimpleQueue()
        """Committed checkpoints that nobody has looked at yet."""
        self._living = Living(paths)
        self._looked = False

    def restored(self, name: CheckpointName, finite: bool = True) -> None:
        """This attempt has read that checkpoint whole."""
        self._spoilt[name] = not finite
        with suppress(OSError):  # Then it does not count, and more is kept.
            if self._attempt and self._proves(name):
                self._known.add(name)

    def _proves(self, name: CheckpointName) -> bool:
        """Whether to read a checkpoint whole proves that it is in the store.

        Read by way of a cache it does where another machine wrote it: this one's cache has never seen it.
        """
        if self._mount.proof is Proof.READ_BACK:
            return True
        try:
            with within("reading an attempt's records"):
                by = machines(read_events(self._paths, name.attempt, ("start", "machines"), all_of_them=True))
        except (LayoutError, OSError):
            return False  # It may have been this machine too.
        assert self._attempt
        return "None" not in by and not by & {self._attempt.machine, machine_token()}

    def _look_for_another(self) -> None:
        """Where uploads cannot be seen, or not yet: read more of other machines' checkpoints, until enough count."""
        self._looked = True
        with within("listing checkpoints"):
            names = list_checkpoints(self._paths)
        run_id = read_manifest(self._paths.checkpoint(max(self._known))).facts.get("run_id")
        for name in names:
            if name < min(self._known) and self._proves(name):
                with suppress(LayoutError, FileNotFoundError):
                    manifest = read_manifest(self._paths.checkpoint(name))
                    mine = belongs(manifest, name) and is_of(manifest, run_id)
                    self._spoilt[name] = not manifest.finite
                    if mine and not problem(self._paths.checkpoint(name), manifest, self.on_disk):
                        self._known.add(name)
            if len(self._known) >= self._keep_latest:
                return

    def report(self, name: CheckpointName, rank: int, store: Any, hurried: threading.Event) -> None:
        """Other ranks: tell rank 0 once this rank's share is in the store, where only this machine's mount knows."""
        if self._log is None:
            return
        share, end = self._inside(name) / share_name(rank), time.monotonic() + UPLOADED_S
        while not self._log.has(share):
            if time.monotonic() > end or hurried.wait(LOOK_S):
                return
        store.set(_key(name, rank), "1")

    def committed(self, name: CheckpointName, manifest: Manifest, store: Any, hurried: threading.Event) -> None:
        """Rank 0: a checkpoint is committed. See what is in the store by now, and delete what may be deleted.

        One at a time: whoever finds another at work leaves it to that one, which looks at the newest when it is done.

        Raises:
            OSError: the bucket fails; what was found so far stands.
        """
        self._saves += 1
        self._spoilt[name] = not manifest.finite
        self._todo.put((name, manifest))
        trouble = None
        while not self._todo.empty() and self._at_work.acquire(blocking=False):
            try:
                found = {}
                while not self._todo.empty():  # Only who is at work takes out.
                    found.update([self._todo.get()])
                if found:
                    self._look_behind(found, store, hurried)
            except OSError as error:  # Those that came meanwhile are looked at all the same.
                trouble = trouble or error
            finally:
                self._at_work.release()
            if hurried.is_set():
                break
        if trouble:
            raise trouble

    def _look_behind(self, committed: dict[CheckpointName, Manifest], store: Any, hurried: threading.Event) -> None:
        if self._mount.proof is Proof.READ_BACK:
            name = max(committed)  # Each would be read whole: the newest is enough.
            trouble = problem(self._paths.checkpoint(name), committed[name], self.on_disk)
            if trouble is None:
                self._known.add(name)
            else:
                self._say(f"checkpoint {name} does not read back as it was written: {trouble}")
        elif self._known and not self._looked:
            self._look_for_another()
        if self._log is not None:
            self._waiting.update(committed)
            for waiting in list(self._waiting):
                if self._is_uploaded(waiting, self._log, store):
                    self._known.add(waiting)
                    self._wait_no_more(waiting, store)
        if not hurried.is_set():
            self.prune()
            kept = sorted(self._known, reverse=True)[: self._keep_latest]
            for waiting in [name for name in self._waiting if len(kept) == self._keep_latest and name < kept[-1]]:
                self._wait_no_more(waiting, store)
        if self._saves - self._said_at >= SAY_EVERY and self._mount.proof is Proof.NOTHING:
            self._said_at = self._saves
            self._say_what_is_kept()

    def _wait_no_more(self, name: CheckpointName, store: Any) -> None:
        """What the other ranks said of a checkpoint's upload has been read, or is of no use any more."""
        del self._waiting[name]
        for rank in range(1, self._ranks):
            store.delete_key(_key(name, rank))

    def prune(self) -> None:
        """Delete what is older than the newest that count, and what dead attempts left half written among it.

        A checkpoint whose weights are not finite makes those superfluous that are not either, and no other. The
        manifest goes first: what is left of a checkpoint after an interruption does not count, and goes later.
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
            except OSError as error:  # The others go all the same.
                trouble = trouble or error
        self._delete_torn_tokens()
        if trouble:
            raise trouble

    def _delete_if_idle(self, name: CheckpointName) -> None:
        """Delete an old checkpoint, unless it is half written by somebody who may be alive."""
        mine = name.attempt == self.attempt_name
        if self._is_committed(name) or mine or not self._living.may_write(name.attempt):
            delete(self._paths.checkpoint(name))
            self._known.discard(name)

    def _for_good(self, names: list[CheckpointName]) -> set[CheckpointName]:
        """The first checkpoint at or after each multiple of `keep_every`; of one step the newest attempt's."""
        found: dict[int, CheckpointName] = {}
        for name in sorted(names, key=lambda name: (-name.step, name), reverse=True) if self._keep_every else ():
            multiple = name.step // self._keep_every
            if multiple and multiple not in found and self._is_committed(name) and not self._is_spoilt(name):
                found[multiple] = name
        return set(found.values())

    def _is_committed(self, name: CheckpointName) -> bool:
        with within("looking for a manifest"):
            return (self._paths.checkpoint(name) / MANIFEST).exists()

    def _is_spoilt(self, name: CheckpointName) -> bool:
        """Whether a checkpoint says that its weights are not finite."""
        if name not in self._spoilt:
            try:
                self._spoilt[name] = not read_manifest(self._paths.checkpoint(name)).finite
            except (LayoutError, FileNotFoundError):
                return False  # Not committed, or damaged: it may be written still.
        return self._spoilt[name]

    def _delete_torn_tokens(self) -> None:
        """Prepared data that a dead attempt did not finish."""
        for folder in _files(self._paths.tokens):
            name = AttemptName.parse("-".join(folder.name.rsplit("-", 2)[-2:]))
            with within("looking for a manifest"):
                whole = (folder / MANIFEST).exists()
            if name and name != self.attempt_name and not whole and not self._living.may_write(name):
                delete(folder)

    def _inside(self, name: CheckpointName) -> PurePath:
        return self._mount.inside(self._paths.checkpoint(name))

    def _is_uploaded(self, name: CheckpointName, log: UploadLog, store: Any) -> bool:
        inside = self._inside(name)
        return all(log.has(inside / file) for file in (share_name(0), STATE, MANIFEST)) and all(
            store.check([_key(name, rank)]) for rank in range(1, self._ranks)
        )

    def _say_what_is_kept(self) -> None:
        total, count = 0, 0
        with within("listing checkpoints"):
            names = list_checkpoints(self._paths)
        for name in names:
            with suppress(LayoutError, OSError):
                total += read_manifest(self._paths.checkpoint(name)).total_bytes
                count += 1
        self._say(
            f"{count} checkpoints, {total / 1e9:.1f} GB, are kept in {self._paths.checkpoints}: nothing shows what a "
            f"mount of this kind ({self._mount.kind}) has uploaded, so none is deleted that may be the last whole one"
        )


class Living:
    """Which attempts may be writing still. No clocks are compared: what changes while it is watched is alive."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._seen: dict[AttemptName, tuple[bytes, float]] = {}

    def may_write(self, name: AttemptName) -> bool:
        """Whether an attempt may be alive: it has not ended, and cannot be seen to be gone."""
        with within("reading an attempt's records"):
            if event_named(read_events(self._paths, name, ("end",)), "end"):
                return False
            if (seen := self._is_seen(name)) is not None:
                return seen
            now = b""
            with suppress(OSError):
                now = self._paths.progress(name).read_bytes()
        before, since = self._seen.get(name, (None, 0.0))
        if before != now:
            self._seen[name] = now, time.monotonic()
            return True
        return time.monotonic() - since < DEAD_S

    def _is_seen(self, name: AttemptName) -> bool | None:
        """Whether the process of an attempt of this machine alone lives; None where that is not to be seen."""
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
    """Delete a folder of files, the manifest first; what is gone already, by another attempt's hand, is no error."""
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
