"""Watcher: a thread that asks this machine's metadata service, and passes on what it announces.

Whatever the service does, the thread only waits: it never slows a step and never stops a run.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection

from trainer.notices.here import probe, source_of
from trainer.notices.named import named
from trainer.notices.notice import Notice
from trainer.notices.service import ServiceError
from trainer.notices.source import Announcement, Source

STALE_S = 10.0
"""A machine that was to be taken so long ago is not being taken: the announcement was for an earlier machine."""
HINT_EVERY_S = 3600.0
"""The least time between two saves that hints bring about."""
SILENT_AFTER = 3
"""So many requests in a row without an answer are said, once."""
END_S = 5.0


class Watcher:
    """Asks until the first notice, or until `end`."""

    def __init__(
        self,
        ignored: Collection[str],
        on_notice: Callable[[Notice], None],
        on_hint: Callable[[], None] | None,
        say: Callable[[str], None],
    ) -> None:
        """Prepare; `start` begins to ask.

        Args:
            ignored: Ids of announcements that ended an earlier attempt on this machine.
            on_notice: Called with the notice, once.
            on_hint: Called when one more checkpoint is to be saved now; None: hints are passed over.
            say: Prints a line.
        """
        self._ignored, self._on_notice, self._on_hint, self._say = ignored, on_notice, on_hint, say
        self._source: Source | None = None
        self._over = threading.Event()
        self._said: set[str] = set()
        self._hinted_at: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="notices")

    def start(self) -> None:
        """Say what is heard of, and start the thread if it has something to ask."""
        cloud = named()
        if cloud:
            try:
                self._source = source_of(cloud)
            except ServiceError as error:  # A variable that names the service does not hold a URL.
                self._say(f"notices: {cloud} metadata is not asked: {error}")
            self._say_sources()
        if self._source or not cloud:
            self._thread.start()

    def end(self, wait_s: float = END_S) -> None:
        """End the thread, and wait for that, but no longer than `wait_s`: a request under way ends at once."""
        self._over.set()
        if self._source:
            self._source.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(wait_s)

    def _run(self) -> None:
        if not self._source:
            self._source = probe()
            if not self._over.is_set():
                self._say_sources()
        source, failures = self._source, 0
        while source and not self._over.is_set():
            try:
                announced = source.ask()
                failures = 0
            except Exception as error:  # A service that lies is asked again, as one that is silent.
                announced, failures = [], failures + 1
                if failures == SILENT_AFTER and not self._over.is_set():
                    self._say_once("silent", f"notices: {source.cloud} metadata gives no answer: {error}")
            if any(self._is_notice(one, source) for one in announced):
                break
            poll_s = os.environ.get("SKYSPOT_NOTICE_POLL_S")
            self._over.wait(float(poll_s) if poll_s else source.poll_s if not failures else max(source.poll_s, 1.0))
        if source:
            source.close()

    def _is_notice(self, announced: Announcement, source: Source) -> bool:
        """Deal with an announcement; True if this machine will be taken."""
        left, now = announced.seconds_left, time.monotonic()
        if not announced.takes_machine:
            self._say_once(
                announced.id, f"{source.cloud} event {announced.about} ignored: it does not take this machine"
            )
        elif left != left or (left < -STALE_S and not announced.is_hint):
            self._say_once(announced.id, f"spot notice {announced.about} ignored: its time passed {-left:.0f} s ago")
        elif announced.id in self._ignored:
            self._say_once(announced.id, f"spot notice {announced.about} ignored: it ended an attempt here before")
        elif not announced.is_hint:
            left = min(max(left, 0.0), source.longest_s)
            self._on_notice(Notice(f"{source.cloud}-notice", announced.id, now, left))
            return True
        elif (
            self._on_hint
            and announced.id not in self._said
            and (self._hinted_at is None or now - self._hinted_at >= HINT_EVERY_S)
        ):
            self._hinted_at = now
            self._say_once(announced.id, f"{source.cloud} expects to take this machine ({announced.about}); saving now")
            self._on_hint()
        return False

    def _say_sources(self) -> None:
        signals = "SIGTERM, SIGUSR1" if "SLURM_JOB_ID" in os.environ else "SIGTERM"
        self._say(f"notices: {self._source.cloud} metadata, {signals}" if self._source else f"notices: {signals}")

    def _say_once(self, key: str, line: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._say(line)
