"""Watching a bucket's folder from outside, where it cannot be served through FUSE."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from skyspot.rehearsal import scratch
from skyspot.rehearsal.bucketfs.calls import Calls
from skyspot.rehearsal.bucketfs.polling import Poller
from skyspot.rehearsal.bucketfs.trace import EVENTS, POLLS

LOOK_S = 0.02


class Source(Protocol):
    """Where a watcher's calls come from."""

    def wait(self, seconds: float) -> None:
        """Wait until something has happened, at most for so long."""

    def look(self) -> None:
        """Take in what has happened."""

    def kill_comes(self) -> None:
        """Take in what has happened before the machine is killed."""

    def finish(self) -> None:
        """Take in the rest. The machine is gone."""


@functools.cache
def events_missing() -> str | None:
    """Say why file events cannot be had here; None if they can. Tried once."""
    if find_spec("inotify_simple") is None:
        return "inotify_simple is not installed: pip install 'skyspot[rehearse]'"
    with scratch.folder("probe") as folder:
        try:
            calls = Calls(folder / "trace")
            (folder / "bucket").mkdir()
            source = _source(EVENTS, folder / "bucket", calls)
            (folder / "bucket" / "x").write_text("x")
            (folder / "bucket" / "x").read_text()
            source.finish()
            calls.save()
        except (OSError, ImportError, AttributeError) as error:
            return f"this system has no inotify ({error})"
        names = [call.name for call in calls.all if call.size or call.name == "create"]
        return None if names == ["create", "write", "close", "read"] else "inotify tells no reads here"


class Watcher:
    """Writes the trace of one bucket for as long as a machine lives."""

    def __init__(self, how: str, bucket: Path, trace: Path) -> None:
        """Start watching.

        Args:
            how: EVENTS or POLLS.
            bucket: The folder that stands for the bucket.
            trace: The file; it is written anew.
        """
        self.trace, self.calls = trace, Calls(trace)
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._source: Source | None = None
        try:
            self._source = _source(how, bucket, self.calls)
        except OSError as error:
            self.calls.gap(f"the bucket could not be watched: {error.strerror}")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._source and not self._over.is_set():
            self._source.wait(LOOK_S)
            self._take(self._source.look)

    def _take(self, look: Callable[[], None]) -> None:
        with self._turn:
            try:
                look()
            except OSError as error:
                self.calls.gap(f"the bucket could not be watched: {error.strerror}")

    def kill_comes(self) -> None:
        """Take in what has happened before the machine is killed."""
        if self._source and not self._over.is_set():
            self._take(self._source.kill_comes)

    def stop(self) -> None:
        """End it. The machine is gone."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        if self._source:
            self._take(self._source.finish)
        self.calls.save()


def _source(how: str, bucket: Path, calls: Calls) -> Source:
    if how == POLLS:
        return Poller(bucket, calls)
    # It is imported here because the library is optional.
    return cast("Source", import_module("skyspot.rehearsal.bucketfs.inotify").Inotify(bucket, calls))
