"""The launcher's child that touches the bucket for it, because the launcher must never hang. Standard library only.

    python -m trainer.launch.sidecar RUN_DIR     opens an attempt, watches for a newer one, writes its end
    python -m trainer.launch.sidecar --end CODE CAUSE RUN_DIR NAME
                                                 writes the end event of an attempt whose rank 0 died

It prints messages to the launcher on stdout: `attempt NAME`, `leave CODE`, `stop CAUSE`. On stdin it reads
`end CODE CAUSE`.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from trainer.attempt.ending import NO_PROGRESS, REFUSED, STOP_REQUEST, Ending
from trainer.attempt.history import RECORDS_S, no_progress
from trainer.attempt.identity import identity, newest_readable
from trainer.attempt.limits import Limits, LimitsError, Reached, Reckoning, await_limit, reckon
from trainer.attempt.record import (
    Attempt,
    asked_to_stop,
    launch_id,
    open_attempt,
    record,
    record_limit,
    stop_reason,
    stop_requested,
    times,
)
from trainer.bucket.deadlines import await_overdue, read_manifest
from trainer.bucket.presence import check_bucket
from trainer.bucket.retry import retry
from trainer.errors import TrainerError
from trainer.launch.grace import grace
from trainer.layout.documents import LayoutError, to_json
from trainer.layout.events import event_named, read_events
from trainer.layout.names import AttemptName, RunPaths

LOOK_S = 5.0
LIVES_S = 30.0
"""How often an attempt without a limit shows that it lives; beside a limit, at each look."""


def _leave_when_a_call_hangs() -> None:
    """Leave if any call into the bucket hangs, as SpotRun does."""
    call = await_overdue()
    assert call
    print(f"Error: {call.what} has not returned: the bucket's mount hangs", file=sys.stderr, flush=True)
    _send(f"leave {call.code}")
    os._exit(0)


def record_attempt(run_dir: Path) -> None:
    """Open the attempt of a script that keeps no records itself, watch for a reason to end it, and write its end."""
    paths = RunPaths(run_dir)
    try:
        check_bucket(paths)
        newest = newest_readable(paths, retry(paths, lambda: identity(paths, {})))
        step = newest[1].step if newest else 0
        attempt = open_attempt(paths, launch=launch_id(), config={}, binding=None, newest_step=step)
        stop = retry(paths, lambda: stop_requested(attempt), begun=True)
        stuck = retry(
            paths,
            lambda: no_progress(attempt, step, sees_progress=newest is not None),
            begun=True,
            limit_s=RECORDS_S,
        )
        reckoning = _reckon(attempt)
    except LimitsError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        _leave(attempt, REFUSED, error=str(error))
        return
    except TrainerError as error:
        print(f"Error: {error}", file=sys.stderr)
        _send(f"leave {error.code}")
        return
    if stop:
        print(asked_to_stop(attempt), file=sys.stderr, flush=True)
        _leave(attempt, STOP_REQUEST)
        return
    if stuck:
        print(f"Error: {stuck}", file=sys.stderr, flush=True)
        _leave(attempt, NO_PROGRESS, error=stuck)
        return
    reached = reckoning.reached(grace(None)[0]) if reckoning else None
    if reached and not _has_final(paths):
        print(f"not started: {reached.message}", file=sys.stderr, flush=True)
        record_limit(attempt, reached)
        _leave(attempt, reached.ending)
        return
    _send(f"attempt {attempt.name}")
    _watch(attempt, reckoning)
    message = sys.stdin.readline().split()
    if len(message) == 3 and message[0] == "end":
        write_end(paths, attempt.name, int(message[1]), message[2])


def _reckon(attempt: Attempt) -> Reckoning | None:
    """What the run has spent; None: it has no limit.

    Raises:
        LimitsError: the limit cannot be held.
    """
    limits = Limits.from_env()
    if limits is None:
        return None
    return retry(attempt.paths, lambda: reckon(attempt.paths, attempt.name, limits), begun=True, limit_s=RECORDS_S)


def _has_final(paths: RunPaths) -> bool:
    """True if the run has exported a model: a script with SpotRun then says whether it is finished."""
    with suppress(LayoutError, OSError):
        return read_manifest(paths.final).kind == "final"
    return False


def _watch(attempt: Attempt, reckoning: Reckoning | None) -> None:
    """Report the first reason to end the attempt; return when the launcher sends something, or is gone.

    Until the script itself records, as SpotRun does, progress.json shows how long the attempt has lived. Such a script
    alone then holds the limits.
    """
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.buffer, selectors.EVENT_READ)
    limits = _LimitWatch(reckoning) if reckoning else None
    sent, lives, show_at = False, True, 0.0
    while not selector.select(LOOK_S):
        # If the bucket does not answer now, the next round tries again.
        shows = lives and (limits is not None or time.monotonic() >= show_at)
        with suppress(OSError):
            if shows and event_named(read_events(attempt.paths, attempt.name, ("bound",)), "bound"):
                lives = shows = False
                if limits:
                    limits.over.set()
                    limits = None
        with suppress(OSError):
            if not sent and (found := stop_reason(attempt)):
                _send(f"stop {found.ending.cause}")
                sent = True
        with suppress(OSError):
            if shows and not (limits and limits.reached):
                attempt.paths.progress(attempt.name).write_bytes(to_json(times()))
                show_at = time.monotonic() + LIVES_S
    if limits and limits.reached:
        record_limit(attempt, limits.reached)


class _LimitWatch:
    """A thread that looks at the limits beside the bucket, which may refuse or hang."""

    def __init__(self, reckoning: Reckoning) -> None:
        self.reached: Reached | None = None
        self.over = threading.Event()
        """Set once the script itself holds the limits."""

        def work() -> None:
            if found := await_limit(reckoning.reached, LOOK_S, lambda: grace(None)[0], self.over):
                self.reached = found[0]
                print(f"{self.reached.message}; the script gets SIGTERM", file=sys.stderr, flush=True)
                _send(f"stop {self.reached.ending.cause}")

        threading.Thread(target=work, daemon=True, name="limits").start()


def write_end(paths: RunPaths, name: AttemptName, code: int, cause: str) -> None:
    """Write an attempt's end event, unless it has one."""
    events = read_events(paths, name)
    if event_named(events, "end"):
        return
    start = event_named(events, "start") or {}
    attempt = Attempt(paths, name, str(start.get("launch", "")), str(start.get("machine", "")))
    record(
        attempt,
        "end",
        code=code,
        cause=cause,
        step=None,
        committed_step=None,
        error=None,
        notice=None,
        committed_s=None,
    )


def _leave(attempt: Attempt, ending: Ending, **fields: str) -> None:
    # Sent before the end is recorded: the launcher waits a few seconds for the record, even if the mount hangs.
    _send(f"leave {ending.code}")
    record(attempt, "end", code=ending.code, cause=ending.cause, step=0, **fields)


def _send(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Run the command line; an error of the bucket is printed in a line."""
    # Where a signal reaches every process, the end is still to be recorded; the launcher ends this one.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        if sys.argv[1] == "--end":
            name = AttemptName.parse(sys.argv[5])
            if name:
                write_end(RunPaths(Path(sys.argv[4])), name, int(sys.argv[2]), sys.argv[3])
        else:
            threading.Thread(target=_leave_when_a_call_hangs, daemon=True, name="bucket").start()
            record_attempt(Path(sys.argv[1]))
    except OSError as error:
        print(f"The attempt's end could not be recorded: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
