"""What Ctrl-C, SIGTERM and SIGHUP do during a rehearsal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen
from types import FrameType

AGAIN_S = 0.005
"""After so long an interrupt that could not be raised is tried again."""
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C, SIGTERM and SIGHUP during a clean-up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first Ctrl-C, SIGTERM or SIGHUP, and ignore the next ones: it cleans up."""

    def interrupt(_number: int, frame: FrameType | None) -> None:
        if frame and _would_stay_locked(frame):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            return
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    # An ignored signal stays ignored, as under nohup.
    before = {number: signal.getsignal(number) for number in _NUMBERS if signal.getsignal(number) != signal.SIG_IGN}
    before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _would_stay_locked(frame: FrameType) -> bool:
    """True if an exception here may leave a process locked, and the next wait for it would never end.

    Popen takes its lock one instruction before the `try` that gives it back.
    """
    ours = (Popen._internal_poll.__code__, Popen._wait.__code__)  # type: ignore[attr-defined]
    return frame.f_code in ours and frame.f_locals["self"]._waitpid_lock.locked()
