"""A rank's end of the pipes to its launcher, and the messages that travel there. Standard library only."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

PEER_GONE = b"peer-gone"
"""Launcher to rank: another rank left."""
LEAVE_AT_ONCE = b"leave-at-once"
"""Launcher to rank: Ctrl-C was pressed again and again."""
ATTEMPT = "attempt"
"""Rank to launcher, with JSON: the run's folder, and the attempt's name."""
LISTENS = "listens"
"""Rank to launcher: this rank reads its pipe, so it needs no SIGTERM when another rank leaves."""
NOTICE = "notice"
"""Rank to launcher, with seconds: the cloud takes this machine then; until then, a SIGTERM gives no less time."""
ENDED = "ended"
"""Rank to launcher: the attempt's end event is written."""
EXIT = "exit"
"""Rank to launcher, with the exit code: this rank leaves."""


class Link:
    """Messages to and from the launcher; without a launcher, it sends nothing and receives nothing."""

    def __init__(self, read: int | None = None, write: int | None = None, printed: int | None = None) -> None:
        """Use these file descriptors.

        Args:
            read: The pipe from the launcher.
            write: The pipe to the launcher.
            printed: The file in which the ranks of this node note the messages that they have printed.
        """
        self._read, self._write, self._printed = read, write, printed

    @classmethod
    def from_env(cls) -> Link:
        """Return the link that the launcher left in SKYSPOT_LINK, as three file descriptors."""
        text = os.environ.get("SKYSPOT_LINK", "")
        try:
            read, write, printed = (int(part) for part in text.split(","))
            for descriptor in (read, write, printed):
                os.fstat(descriptor)
        except (ValueError, OSError):
            return cls()
        return cls(read, write, printed)

    @property
    def is_connected(self) -> bool:
        """True if there is a launcher, which records the end of an attempt if this process does not."""
        return self._write is not None

    def is_first_to_print(self, message: str) -> bool:
        """Note that this rank prints a message; False if another rank of this node has, even if it is gone by now."""
        if self._printed is None:
            return True
        line = _line(message)
        with suppress(OSError):
            fcntl.lockf(self._printed, fcntl.LOCK_EX)
            try:
                printed = os.pread(self._printed, os.fstat(self._printed).st_size, 0)
                if line in printed.splitlines(keepends=True):
                    return False
                os.pwrite(self._printed, line, len(printed))
            finally:
                fcntl.lockf(self._printed, fcntl.LOCK_UN)
        return True

    def was_printed(self, message: str) -> bool:
        """True if a rank of this node has noted the same message with `is_first_to_print`."""
        if self._printed is not None:
            with suppress(OSError):
                printed = os.pread(self._printed, os.fstat(self._printed).st_size, 0)
                return _line(message) in printed.splitlines(keepends=True)
        return False

    def report_attempt(self, run_dir: Path, attempt: object) -> None:
        """Name the attempt, so that the launcher can have its end recorded if this rank dies."""
        self._send(f"{ATTEMPT} " + json.dumps({"run_dir": str(run_dir), "attempt": str(attempt)}))

    def report_notice(self, seconds_left: float) -> None:
        """Report that the cloud takes this machine in so many seconds."""
        self._send(f"{NOTICE} {seconds_left:.3f}")

    def report_end_written(self) -> None:
        """Report that the attempt's end event is written."""
        self._send(ENDED)

    def report_exit(self, code: int) -> None:
        """Report that this rank leaves with `code`, which counts even if the process cannot be reaped."""
        self._send(f"{EXIT} {code}")

    def watch(self, on_peer_gone: Callable[[], None], on_leave_at_once: Callable[[], None]) -> None:
        """Call back, on a thread of its own, when the launcher sends a message.

        Args:
            on_peer_gone: Another rank left.
            on_leave_at_once: This rank is to leave now.
        """
        if self._read is not None:
            self._send(LISTENS)
            calls = {LEAVE_AT_ONCE: on_leave_at_once, PEER_GONE: on_peer_gone}
            threading.Thread(target=self._listen, args=(calls,), daemon=True, name="launcher").start()

    def _send(self, line: str) -> None:
        if self._write is not None:
            with suppress(OSError):
                os.write(self._write, line.encode("ascii", "backslashreplace") + b"\n")

    def _listen(self, calls: Mapping[bytes, Callable[[], None]]) -> None:
        assert self._read is not None
        received = b""
        with suppress(OSError):
            while data := os.read(self._read, 4096):
                *messages, received = (received + data).split(b"\n")
                for message in messages:
                    calls[message]()  # Each ends this process, sooner or later.


def _line(message: str) -> bytes:
    """Return a message as it stands in the file of printed messages."""
    return repr(message).encode() + b"\n"
