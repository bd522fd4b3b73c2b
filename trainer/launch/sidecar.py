"""The launcher's child that touches the bucket in its stead. Standard library only.

    python -m trainer.launch.sidecar RUN_DIR     opens an attempt, watches for a newer one, writes its end
    python -m trainer.launch.sidecar --end CODE CAUSE RUN_DIR NAME
                                                 writes the end event of an attempt whose rank 0 died

It says on stdout what the launcher has to know: `attempt NAME`, `leave CODE`, `superseded`, `stop-request`; and reads
`end CODE CAUSE`.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
from contextlib import suppress
from pathlib import Path

from trainer.attempt.ending import NO_PROGRESS, STOP_REQUEST, Ending
from trainer.attempt.history import RECORDS_S, no_progress
from trainer.attempt.identity import identity, newest_readable
from trainer.attempt.record import Attempt, launch_id, newer_attempt, open_attempt, record, stop_requested
from trainer.bucket.deadlines import await_overdue
from trainer.bucket.presence import check_bucket
from trainer.bucket.retry import retry
from trainer.errors import TrainerError
from trainer.layout.events import event_named, read_events
from trainer.layout.names import AttemptName, RunPaths

LOOK_S = 5.0


def _leave_what_hangs() -> None:
    """As SpotRun: a call that hangs is left, whatever it is."""
    call = await_overdue()
    print(f"Error: {call.what} has not returned: the bucket's mount hangs", file=sys.stderr, flush=True)
    _say(f"leave {call.code}")
    os._exit(0)


def keep(run_dir: Path) -> None:
    """Keep the attempt of a script that knows nothing of attempts."""
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
    except TrainerError as error:
        print(f"Error: {error}", file=sys.stderr)
        _say(f"leave {error.code}")
        return
    if stop:
        print(f"not started: {paths.stop(attempt.launch)} asks this launch to stop", file=sys.stderr, flush=True)
        _leave(attempt, STOP_REQUEST)
        return
    if stuck:
        print(f"Error: {stuck}", file=sys.stderr, flush=True)
        _leave(attempt, NO_PROGRESS, error=stuck)
        return
    _say(f"attempt {attempt.name}")
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.buffer, selectors.EVENT_READ)
    said = False
    while not selector.select(LOOK_S):
        with suppress(OSError):  # A bucket that does not answer now is asked again.
            if not said and newer_attempt(attempt):
                _say("superseded")
                said = True
            elif not said and stop_requested(attempt):
                _say("stop-request")
                said = True
    words = sys.stdin.readline().split()
    if len(words) == 3 and words[0] == "end":
        write_end(paths, attempt.name, int(words[1]), words[2])


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
    # Said before the end is recorded: the launcher waits a few seconds for that, and for a mount that hangs no longer.
    _say(f"leave {ending.code}")
    record(attempt, "end", code=ending.code, cause=ending.cause, step=0, **fields)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Do what the command line says; a bucket that cannot be written is said in a line."""
    try:
        if sys.argv[1] == "--end":
            name = AttemptName.parse(sys.argv[5])
            if name:
                write_end(RunPaths(Path(sys.argv[4])), name, int(sys.argv[2]), sys.argv[3])
        else:
            threading.Thread(target=_leave_what_hangs, daemon=True).start()
            keep(Path(sys.argv[1]))
    except OSError as error:
        print(f"the attempt's end could not be recorded: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
