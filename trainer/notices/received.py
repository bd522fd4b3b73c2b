"""All notices that this process has received, from signals and from the cloud. Standard library only.

A signal handler only notes the time; everything else happens at a boundary between two steps.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from trainer.machine.flag import Flag
from trainer.notices.notice import Notice
from trainer.notices.presses import PRESSES, Presses
from trainer.notices.watcher import Watcher

SIGNALS = {
    signal.SIGTERM: "sigterm",
    signal.SIGINT: "sigint",
    signal.SIGUSR1: "sigusr1",
    signal.SIGHUP: "sighup",
}
"""The signals that ask for a stop, and the kinds of their notices."""
LEFT_TO_PROGRAM = (signal.SIGUSR1, signal.SIGHUP)
"""Those that are not handled where the program handles or ignores them; nohup has it ignore SIGHUP."""


class Notices:
    """All notices received so far."""

    def __init__(self, grace_s: float) -> None:
        """Start without notices.

        Args:
            grace_s: Seconds between SIGTERM and SIGKILL.
        """
        self.grace_s = grace_s
        self.received = Flag()
        self.signalled = Flag()
        """Set by a signal; a program that waits for the next signal replaces it first."""
        self.hinted = threading.Event()
        """The cloud expects to take this machine; whoever has saved clears it."""
        self.on_notice: Callable[[Notice], None] = lambda notice: None
        """Called with the cloud's notice, on another thread."""
        self.on_presses: Callable[[], None] = lambda: None
        """Called where Ctrl-C was pressed `PRESSES` times within `PRESSES_S`, in the signal handler."""
        self._presses = Presses()
        self._notices: list[Notice] = []
        self._replaced: dict[int, Any] = {}
        """The handlers of signals before `install`."""
        self._terminals: list[int] = []
        """Which of stdout and stderr were a terminal at `install`."""
        self._watcher: Watcher | None = None

    def install(self) -> None:
        """Handle the signals from now on; call on the main thread. A program's own handler of some of them stays."""
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in SIGNALS:
            if number not in LEFT_TO_PROGRAM or signal.getsignal(number) is signal.SIG_DFL:
                self._replaced[number] = signal.signal(number, self._on_signal)

    def end(self) -> None:
        """Handle signals as before `install`, and stop watching; call on the main thread."""
        if self._watcher:
            self._watcher.end()
        for number, handler in self._replaced.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def watch(self, ignored: frozenset[str] = frozenset(), say: Callable[[str], None] = print) -> None:
        """Watch this machine's metadata service from now on, on a thread, if there is one.

        Args:
            ignored: Ids of the notices that ended an earlier attempt on this machine.
            say: Prints a line.
        """
        self._watcher = Watcher(ignored, self._take_in, self.hinted.set, say)
        self._watcher.start()

    def first(self) -> Notice | None:
        """The notice with the earliest deadline; None if there is no notice.

        The cloud's own word counts before a signal: SkyPilot may pass a notice on as a SIGTERM, before or after it.
        """
        clouds = [notice for notice in self._notices if notice.kind not in SIGNALS.values()]
        return min(clouds or self._notices, key=lambda notice: notice.deadline, default=None)

    def _take_in(self, notice: Notice) -> None:
        self._notices.append(notice)
        self.received.set()
        self.on_notice(notice)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        kind = SIGNALS[signal.Signals(number)]
        if kind not in {notice.kind for notice in self._notices}:  # A second signal does not move the deadline.
            seconds = slurm_seconds_left() if kind == "sigusr1" else None
            self._notices.append(Notice(kind, kind, time.monotonic(), self.grace_s if seconds is None else seconds))
        self.received.set()
        self.signalled.set()
        if number == signal.SIGHUP:
            self._leave_closed_terminal()
        if number == signal.SIGINT and self._presses.count() >= PRESSES:
            self.on_presses()

    def _leave_closed_terminal(self) -> None:
        """Let what is printed go nowhere, where the terminal is gone: each write to it would raise an error."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def slurm_seconds_left() -> float | None:
    """Seconds until Slurm ends this job at its time limit (`--signal` comes before); None if that is not known."""
    try:
        return max(0.0, float(os.environ["SLURM_JOB_END_TIME"]) - time.time())
    except (KeyError, ValueError):
        return None
