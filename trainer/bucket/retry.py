"""Retries: a call is made again while the bucket refuses it, and a stop is noticed meanwhile. Standard library only."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from trainer.bucket import deadlines
from trainer.errors import AttemptError
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from trainer.layout.names import RunPaths
from trainer.machine import scratch

START_RETRY_S = 600.0
"""The time for which a call is retried before the first step."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
MOUNT_GONE = {errno.ENOTCONN, errno.ESTALE, errno.ENODEV}
# No retry helps against these.
_HOPELESS = scratch.FULL | REFUSED | {errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EISDIR}
_T = TypeVar("_T")


def pauses(seconds: float, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S) -> Iterator[float]:
    """Pauses that double up to `longest_s`, for so many seconds from now on."""
    end = time.monotonic() + seconds

    def until_end() -> Iterator[float]:
        pause_s = first_s
        while (left := end - time.monotonic()) > 0:
            yield min(pause_s, left + 0.1)
            pause_s = min(longest_s, 2 * pause_s)

    return until_end()


def pause(seconds: float, check_stop: Callable[[], None]) -> None:
    """Wait, and call `check_stop` every 50 ms, which raises to stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_stop()
        time.sleep(0.05)


def retry_loop(
    work: Callable[[], _T],
    final_error: Callable[[Exception, bool], BaseException | None],
    pauses_s: Iterator[float],
    check_stop: Callable[[], None] = lambda: None,
    announce: Callable[[Exception], None] = lambda error: None,
) -> _T:
    """Do `work` until it succeeds or its error is final.

    Args:
        work: What to do; may be done several times.
        final_error: Given an error, and whether no try is left: the error to raise instead. None: `work` is retried.
        pauses_s: The pauses between two tries; the error after the last of them has no try left.
        check_stop: Called during a pause; raises to stop.
        announce: Called with the first error that is retried.
    """
    announced = False
    while True:
        try:
            return work()
        except Exception as error:
            pause_s = next(pauses_s, None)
            final = final_error(error, pause_s is None)
            if final is error:
                raise
            if final is not None:
                raise final from None
            assert pause_s is not None
            if not announced:
                announced = True
                announce(error)
        pause(pause_s, check_stop)


def retry(
    paths: RunPaths,
    work: Callable[[], _T],
    check_stop: Callable[[], None] = lambda: None,
    *,
    begun: bool = False,
    limit_s: float | None = None,
) -> _T:
    """Do something in the bucket before the first step or after the last; retry it for ten minutes if it fails.

    Args:
        paths: The run's paths.
        work: What to do; may be done twice.
        check_stop: Called while waiting; raises to stop.
        begun: Whether the attempt is recorded. If so, a mount that is gone or hangs ends it with 75: a new machine may
            have a better one.
        limit_s: How long one try may take once the attempt is recorded; None: as long as any call.

    Raises:
        AttemptError: it failed for ten minutes, or with an error that no retry helps against.
        ScratchError: a local disk is full, not the bucket.
    """
    limit_s, code = (limit_s, EXIT_PREEMPTED) if begun else (START_RETRY_S, EXIT_FAILED)

    def one_try() -> _T:
        with deadlines.within("a call before the first step", limit_s, code):
            return work()

    def final_error(error: Exception, no_try_left: bool) -> Exception | None:
        if not isinstance(error, OSError):
            return error
        where = scratch.blamed(error, paths.root)
        if error.errno in scratch.FULL and not where.startswith(str(paths.root)):
            return scratch.full(Path(where), error.strerror)
        gone = begun and error.errno in MOUNT_GONE
        if not (gone or error.errno in _HOPELESS or no_try_left):
            return None
        recorded = "The attempt cannot be recorded there, so nothing was trained"
        what = "It cannot be read or written" if begun else recorded
        return AttemptError(
            f"{where}: {error.strerror or error}. {what}; nothing that was committed is lost.",
            EXIT_PREEMPTED if gone else EXIT_FAILED,
        )

    def announce(error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        minutes = f"{START_RETRY_S / 60:.0f} minutes"
        print(f"{paths.root}: {reason}; retrying for up to {minutes}", file=sys.stderr, flush=True)

    return retry_loop(one_try, final_error, pauses(START_RETRY_S), check_stop, announce)
