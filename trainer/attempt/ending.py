"""Endings of an attempt: the table of all causes, and the exception that carries one. Standard library only.

The end event records cause and code. SkyPilot restarts a task after code 75 only. README has the same table.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum

from trainer.layout.exit_codes import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    EXIT_STOPPED,
    EXIT_SUPERSEDED,
)
from trainer.notices.named import VARIABLES
from trainer.notices.notice import Notice

STOP_REQUEST_S = 120.0
"""The time that an attempt waits for SkyPilot's cancel after a requested stop (`RunPaths.stop`), once all is saved."""
END_EVENT_S = 5.0
"""The longest wait for the end event: the bucket may hang, and leaving does not."""
HOLD_PAST_DEADLINE_S = 10.0
"""The delay, after the announced time, with which the cloud may take a machine."""


class Hold(Enum):
    """The event that an attempt waits for before it exits, once everything is written."""

    NOTHING = "nothing"
    MACHINE_TAKEN = "the machine is taken"
    """An earlier exit would only start another attempt on that machine. Holds before the first step too."""
    JOB_CANCELLED = "SkyPilot cancels the job"
    """An earlier exit would show a failed job. Before the first step there is no wait: nothing was saved."""


@dataclass(frozen=True)
class Ending:
    """One way in which an attempt ends."""

    cause: str
    code: int
    """The exit code, unless an error or the script has its own."""
    saves: bool = False
    """True if the last boundary is saved first, if there is one."""
    hold: Hold = Hold.NOTHING

    def hold_s(self, deadline: float = 0.0) -> float:
        """The longest time to hold, in seconds.

        Args:
            deadline: When the machine will be taken, as announced (monotonic clock).
        """
        if self.hold is Hold.MACHINE_TAKEN:
            return max(0.0, deadline - time.monotonic()) + HOLD_PAST_DEADLINE_S
        return STOP_REQUEST_S if self.hold is Hold.JOB_CANCELLED else 0.0


FINISHED = Ending("finished", EXIT_DONE, saves=True)
ALREADY_FINISHED = Ending("already-finished", EXIT_DONE)
SIGNAL = Ending("signal", EXIT_PREEMPTED, saves=True)
NOTICE = Ending("notice", EXIT_PREEMPTED, saves=True, hold=Hold.MACHINE_TAKEN)
PEER_GONE = Ending("peer-gone", EXIT_PREEMPTED)
MOUNT_HANGS = Ending("mount-gone", EXIT_PREEMPTED)
HANG = Ending("hang", EXIT_PREEMPTED)
DIED = Ending("died", EXIT_PREEMPTED)
SUPERSEDED = Ending("superseded", EXIT_SUPERSEDED)
STOP_REQUEST = Ending("stop-request", EXIT_STOPPED, saves=True, hold=Hold.JOB_CANCELLED)
MAX_SPEND = Ending("max-spend", EXIT_STOPPED, saves=True)
DEADLINE = Ending("deadline", EXIT_STOPPED, saves=True)
NO_PROGRESS = Ending("no-progress", EXIT_NO_PROGRESS)
REFUSED = Ending("refused", EXIT_FAILED)
ERROR = Ending("error", EXIT_FAILED)
PEER_CRASHED = Ending("peer-crashed", EXIT_FAILED)

ENDINGS = {
    ending.cause: ending
    for ending in (
        FINISHED, ALREADY_FINISHED, SIGNAL, NOTICE, PEER_GONE, MOUNT_HANGS, HANG, DIED, SUPERSEDED, STOP_REQUEST,
        MAX_SPEND, DEADLINE, NO_PROGRESS, REFUSED, ERROR, PEER_CRASHED,
    )
}  # fmt: skip
"""All endings by cause."""

STOPS = {
    "sigterm": SIGNAL,
    "sigint": SIGNAL,
    "sigusr1": SIGNAL,
    "sighup": SIGNAL,
    **{f"{cloud}-notice": NOTICE for cloud in VARIABLES.values()},
    "stop-request": STOP_REQUEST,
    "superseded": SUPERSEDED,
    "max-spend": MAX_SPEND,
    "deadline": DEADLINE,
}
"""By kind of stop: a notice's kind, or the cause of a reason that rank 0 finds in the bucket (`record.stop_reason`)."""


class Leaving(BaseException):
    """Raised where this attempt has to end in the middle of its work."""

    def __init__(
        self,
        ending: Ending,
        message: str = "",
        *,
        code: int | None = None,
        notice: Notice | None = None,
        hold_s: float = 0.0,
    ) -> None:
        """Describe the end.

        Args:
            ending: Why the attempt ends.
            message: The line to print about it.
            code: The exit code; None: the ending's code.
            notice: The notice that announced it.
            hold_s: How long to hold, in seconds.
        """
        super().__init__(message)
        self.ending, self.message, self.notice, self.hold_s = ending, message, notice, hold_s
        self.code = ending.code if code is None else code
