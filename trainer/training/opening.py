"""Opening: begins an attempt in the bucket. Rank 0 records it, and the other machines check that they see it."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

from trainer.attempt.ending import ALREADY_FINISHED, ERROR, NO_PROGRESS, PEER_CRASHED, REFUSED, STOP_REQUEST, Leaving
from trainer.attempt.history import RECORDS_S, ignored_notices, is_finished, no_progress
from trainer.attempt.identity import identity, new_run_id, newest_readable
from trainer.attempt.limits import Limits, LimitsError, reckon
from trainer.attempt.record import (
    Attempt,
    StopReason,
    adopt,
    asked_to_stop,
    launch_id,
    open_attempt,
    record,
    record_limit,
    stop_requested,
)
from trainer.bucket.deadlines import read_manifest
from trainer.bucket.presence import check_bucket
from trainer.bucket.retry import retry
from trainer.errors import RunError, one_line
from trainer.launch.others import supervised
from trainer.layout.exit_codes import EXIT_FAILED
from trainer.layout.names import AttemptName
from trainer.machine.token import machine_token
from trainer.ranks.messages import STOPPED
from trainer.training.participant import Participant
from trainer.training.unwinding import exit_code

SEE_ATTEMPT_S = 90.0
MAIN_THREAD_S = 5.0
"""The time that the main thread has to leave at a limit before the first step."""


def open_or_refuse(run: Participant) -> tuple[str | list[Any], BaseException | None]:
    """Rank 0: open the attempt; returns the message for the other ranks, and the error that rank 0 then raises itself.

    The message is the attempt's name, or [cause, message, exit code] where all ranks leave at once.
    """
    try:
        return str(_open(run)), None
    except Leaving as leaving:
        if run.world_size == 1:
            raise
        return [leaving.ending.cause, leaving.message, leaving.code], leaving
    except Exception as error:
        if run.world_size == 1 or supervised():
            raise
        code = exit_code(error)
        ending = PEER_CRASHED if code == EXIT_FAILED else ERROR
        return [ending.cause, f"rank 0: {one_line(error)}", code], error


def _open(run: Participant) -> AttemptName:
    """Rank 0: write `start`, then look whether there is anything to do, before model or data are touched."""
    check_bucket(run.paths)
    known = retry(run.paths, lambda: identity(run.paths, run.binding), run.check_stop)
    run.run_id = known or new_run_id(run.binding)
    found = newest_readable(run.paths, run.run_id, run.check_stop, run.config.on_nan != "ignore")
    run.newest = found[1] if found else None
    newest_step = run.newest.step if run.newest else 0
    launch = launch_id()
    facts: dict[str, Any] = {
        "config": run.config.to_json(),
        "binding": run.binding,
        "processes": run.world_size,
        "newest_step": newest_step,
    }
    opened = AttemptName.parse(os.environ.get("SKYSPOT_ATTEMPT", ""))
    if opened and run.retry(run.paths.attempt(opened).is_dir):
        attempt: Attempt = run.retry(lambda: adopt(run.paths, opened, launch, **facts))
    else:
        attempt = open_attempt(run.paths, launch=launch, check_stop=run.check_stop, **facts)
    run.attempt = attempt
    run.link.report_attempt(run.paths.root, attempt.name)
    run.refuse_other_binding()
    from trainer.bucket.verify import problem

    def finished() -> bool:
        return is_finished(run.paths, run.run_id, run.binding, problem)

    if run.retry(finished, math.inf):  # Reads the whole model; each read has its own limit.
        if not run.unwinds:
            raise _already_finished(run)
        # The program has not said yet where training ends.
        run.whole_final = run.retry(lambda: read_manifest(run.paths.final))
    if run.retry(lambda: stop_requested(attempt)):
        if run.whole_final and not run.has_own_loop:  # The settings say where training ends: a finished run has.
            raise _already_finished(run)
        raise Leaving(STOP_REQUEST, asked_to_stop(attempt))
    _reckon(run, attempt)
    stuck = run.retry(lambda: no_progress(attempt, newest_step), RECORDS_S)
    if stuck:
        raise Leaving(NO_PROGRESS, stuck)
    _watch_for_notices(run, attempt.name, attempt.machine)
    return attempt.name


def _reckon(run: Participant, attempt: Attempt) -> None:
    """Read what the run has spent; leave where a limit is reached already, or cannot be held."""
    try:
        limits = Limits.from_env()
        if limits is None:
            return
        reckoning = run.retry(lambda: reckon(run.paths, attempt.name, limits), RECORDS_S)
    except LimitsError as error:
        raise Leaving(REFUSED, str(error)) from None
    reached = reckoning.reached(run.grace_s)
    if reached and not run.whole_final:
        record_limit(attempt, reached)
        raise Leaving(reached.ending, f"not started: {reached.message}")
    run.reckoning = reckoning
    run.begin_records()
    assert run.journal
    run.journal.stop_takes_s = lambda: run.grace_s
    run.journal.hold_limits(lambda found: _leave_unless_steps(run, found))


def _leave_unless_steps(run: Participant, found: StopReason) -> None:
    """Leave at a limit before the first step, if the main thread does not: it may sleep, download or hang."""
    if run.has_steps.wait(min(run.grace_s, MAIN_THREAD_S)) or run.final_is_whole or run.whole_final:
        return
    run.print_line(found.message)
    if hasattr(run, "group"):
        run.group.post_message(STOPPED, json.dumps([found.ending.cause, 0.0]))
    run.leave(found.ending, error=found.message)


def _already_finished(run: Participant) -> Leaving:
    run.final_is_whole = True
    return Leaving(ALREADY_FINISHED, f"already finished: {run.paths.final} is whole")


def _watch_for_notices(run: Participant, name: AttemptName, machine: str) -> None:
    """Start to watch the cloud's metadata service: one rank of each machine does, because notices are per machine."""
    ignored = run.retry(lambda: ignored_notices(run.paths, name, machine), RECORDS_S)

    def say(line: str) -> None:
        if run.link.is_first_to_print(line):  # The launcher may have said which notices are heard.
            run.print_line(line)

    run.notices.watch(frozenset(ignored), say)


def join_machines(run: Participant) -> None:
    """Check each machine's mount, start to watch for its notices, and record all machines.

    Raises:
        AttemptError: the bucket is not mounted here; the attempt ends with 1 on all machines.
    """
    machine = ""
    with run.group.before_gather("machine"):
        if run.group.local_rank == 0:
            machine = machine_token()
            if run.rank:
                check_bucket(run.paths)
                _await_record(run)
                _watch_for_notices(run, run.attempt_name, machine)
        tokens = run.group.gather("machine", machine, run.check_stop)
    if attempt := run.attempt:
        found = [token for token in tokens if token]
        run.retry(lambda: record(attempt, "machines", machines=found))


def _await_record(run: Participant) -> None:
    """Wait until rank 0's record shows here: two mounts of one bucket differ for a while only, two buckets for ever."""
    folder, end = run.paths.attempt(run.attempt_name), time.monotonic() + SEE_ATTEMPT_S
    while not run.retry(folder.is_dir):
        run.check_stop()
        if time.monotonic() > end:
            raise RunError(
                f"{folder}: the first machine wrote it, but this one has not seen it for {SEE_ATTEMPT_S:g} s. Mount "
                "the same bucket and folder on all machines. Nothing was written here."
            )
        time.sleep(0.2)
