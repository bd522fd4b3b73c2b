"""One rank's part in an attempt: how it begins, when it has to stop, what binds the run, and how it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.attempt.binding import binding_problem, plain_binding
from trainer.attempt.ending import (
    ALREADY_FINISHED,
    ENDINGS,
    ERROR,
    NO_PROGRESS,
    PEER_CRASHED,
    PEER_GONE,
    REFUSED,
    STOP_REQUEST,
    STOPS,
    SUPERSEDED,
    Ending,
    Leaving,
)
from trainer.attempt.history import RECORDS_S, ignored_notices, is_finished, no_progress
from trainer.attempt.identity import identity, new_run_id, newest_readable
from trainer.attempt.notices import Notice, Notices
from trainer.attempt.record import (
    Attempt,
    adopt,
    launch_id,
    newer_attempt,
    open_attempt,
    record,
    stop_requested,
    superseded,
)
from trainer.bucket.deadlines import within
from trainer.bucket.presence import check_bucket
from trainer.bucket.retry import MOUNT_GONE, retry
from trainer.errors import RunError, TrainerError, one_line
from trainer.launch.grace import grace
from trainer.launch.link import Link
from trainer.launch.nodes import Nodes
from trainer.layout.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from trainer.layout.manifest import Manifest
from trainer.layout.names import AttemptName, RunPaths
from trainer.machine import scratch
from trainer.machine.token import machine_token
from trainer.ranks.messages import END_WRITTEN, STOPPED
from trainer.training.config import INPUT_BINDINGS, RunConfig, unknown_field

if TYPE_CHECKING:
    from trainer.ranks.group import RankGroup
    from trainer.training.journal import Journal

LEAVE_LAST_S = 6.0
END_EVENT_S = 5.0
LOOK_AT_STORE_S = 0.5
LOOK_AT_BUCKET_S = 5.0
SEE_ATTEMPT_S = 90.0


class Participant:
    """This process among those of an attempt.

    Attributes:
        rank, world_size: Its place among them.
        grace_s: Seconds from SIGTERM to SIGKILL: the launcher's, or the config's where that is less.
        paths: The run's folder.
        attempt: Rank 0's record of the attempt; None on other ranks.
    """

    def __init__(self, config: RunConfig, binding: dict[str, Any]) -> None:
        self.grace_s, self._grace_note = grace(config.grace_s)
        self.config = dataclasses.replace(config, grace_s=self.grace_s)
        self.binding = binding
        self.paths = RunPaths(config.checkpoint_dir)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.launched_at = float(os.environ.get("SKYSPOT_LAUNCHED_AT", time.monotonic()))
        self.allowed = set(config.allow_config_change)
        """The fields that may differ from the run's first attempt."""
        self.is_same: Callable[[str, Mapping[str, Any]], bool] = lambda name, first: False
        """Whether a field that differs from what bound first is the same thing under another name."""
        self.attempt: Attempt | None = None
        self.run_id: str | None = None
        """Rank 0: which run this is; other runs' checkpoints do not count."""
        self.newest: Manifest | None = None
        """Rank 0: the newest checkpoint's, as it was when the attempt began."""
        self.attempt_name: AttemptName
        self.journal: Journal | None = None
        self.group: RankGroup
        self.link = Link.from_env()
        self.notices = Notices(self.grace_s)
        self.peer_gone = threading.Event()
        self.stopping: Ending | None = None
        """What all ranks have agreed to stop for; from then on a peer's leaving is expected."""
        self.trouble: Callable[[], BaseException | None] = lambda: None
        """What all ranks are about to leave for; where another has left for it already, it is no lost peer."""
        self.final_is_whole = False
        self.steps_done = 0
        self.committed_step: int | None = None
        self.skipped = 0
        """Steps of the run whose update was dropped because it was not finite."""
        self._leaving = threading.Lock()
        self._ending = threading.Event()
        """This rank has a reason of its own to leave, and is about to say it."""
        self._serve_on_s = LEAVE_LAST_S
        """How long rank 0 serves the store for the others once it leaves."""
        self._alive, self._living = ExitStack(), ExitStack()
        self._look_at_store = self._look_at_bucket = 0.0

    # -- a stop, and what binds ----------------------------------------------------------------------------------------

    def check_stop(self) -> None:
        """Look for a stop between two pieces of work outside of the training loop; nothing is saved there.

        Raises:
            Leaving: a notice was heard, here or on another machine; a newer attempt has begun; a stop was asked for.
        """
        if not self.final_is_whole:
            notice = self.notices.first()
            if notice:
                self._stop_all(STOPS[notice.kind], f"{notice.kind} before the first step", notice)
            self._look_at_the_others()
            if self.attempt:
                self._look_at_the_bucket(self.attempt)
        if self.peer_gone.is_set():
            raise Leaving(PEER_GONE, "another rank is gone")

    def _look_at_the_others(self) -> None:
        """Has another machine been told to stop?"""
        if self._across() and time.monotonic() >= self._look_at_store:
            self._look_at_store = time.monotonic() + LOOK_AT_STORE_S
            if word := self.group.read_message(STOPPED):
                cause, hold_s = json.loads(word)
                message = "another machine was told to stop before the first step"
                raise Leaving(ENDINGS[cause], message, hold_s=hold_s)

    def _look_at_the_bucket(self, attempt: Attempt) -> None:
        """Rank 0: what `Journal` looks for as soon as training has begun."""
        if self.journal is None and time.monotonic() >= self._look_at_bucket:
            self._look_at_bucket = time.monotonic() + LOOK_AT_BUCKET_S
            newer, is_requested = None, False
            with suppress(OSError), within("looking for other attempts"):
                newer = newer_attempt(attempt)
                is_requested = stop_requested(attempt)
            if newer:
                self._stop_all(SUPERSEDED, superseded(newer))
            if is_requested:
                self._stop_all(STOP_REQUEST, "a stop was asked for before the first step")

    def _stop_all(self, ending: Ending, message: str, notice: Notice | None = None) -> NoReturn:
        """Leave, and let the other machines do so for the same reason."""
        hold_s = ending.hold_s(notice.deadline) if notice else 0.0
        if self._across():
            self.group.post_message(STOPPED, json.dumps([ending.cause, hold_s]))
        raise Leaving(ending, message, notice=notice, hold_s=hold_s)

    def _across(self) -> bool:
        """Whether there are other machines, and this rank has its seat among theirs."""
        return hasattr(self, "group") and self.group.several_nodes

    def await_all_ready(self) -> None:
        """Wait for the other ranks before the first collective, however long they load; each gives signs of life."""
        self.group.gather("ready", True, self.check_stop)
        self._alive.close()

    def ask(self, work: Callable[[], Any], limit_s: float | None = None) -> Any:
        """Do something in the bucket between the attempt's start and its first step; see `bucket.retry.retry`.

        Args:
            work: What to do; may be done several times.
            limit_s: How long one try may take; infinite where each of its calls has a limit of its own.
        """
        return retry(self.paths, work, self.check_stop, begun=True, limit_s=limit_s)

    def say(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if self.rank == 0:
            from trainer.training.console import print_line

            print_line(text)

    def bind(self, **values: Any) -> None:
        """Add to what binds the run, once it is known (the data's key, say).

        Raises:
            Leaving: the run was begun with another value; the attempt is refused.
        """
        self.binding.update(plain_binding(values))
        if self.rank == 0:
            assert self.attempt
            attempt = self.attempt
            self.ask(lambda: record(attempt, "bound", binding=self.binding))
            self._refuse_other_binding(self.newest)

    def refuse_unknown_names(self) -> None:
        """Refuse a field that may change and that there is not, once all that binds the run is known.

        Raises:
            Leaving: the attempt is refused.
        """
        then = self.newest.facts.get("binding") if self.newest else None
        known = {item.name for item in dataclasses.fields(self.config)} | self.binding.keys() | INPUT_BINDINGS
        known |= then.keys() if isinstance(then, Mapping) else set()
        if trouble := unknown_field(self.config.allow_config_change, known):
            raise Leaving(REFUSED, trouble)

    def _refuse_other_binding(self, newest: Manifest | None) -> None:
        assert self.attempt
        attempt = self.attempt

        def problem() -> str | None:
            return binding_problem(self.paths, attempt, self.binding, self.allowed, newest, self.is_same)

        trouble = self.ask(problem, RECORDS_S)
        if trouble:
            raise Leaving(REFUSED, trouble)

    # -- the start -----------------------------------------------------------------------------------------------------

    def _open_or_leave(self) -> tuple[str | list[Any], BaseException | None]:
        """Rank 0's word to the others, and what it then raises itself.

        The word is the attempt's name, or [cause, message, exit code] of leaving at once.
        """
        try:
            self._open_attempt()
            assert self.attempt
            return str(self.attempt.name), None
        except Leaving as leaving:
            if self.world_size == 1:
                raise
            return [leaving.ending.cause, leaving.message, leaving.code], leaving
        except Exception as error:
            if not Nodes.from_env().several:
                raise
            code = exit_code(error)
            ending = PEER_CRASHED if code == EXIT_FAILED else ERROR
            return [ending.cause, f"rank 0: {one_line(error)}", code], error

    def _open_attempt(self) -> None:
        """Rank 0: write `start`, then look whether there is anything to do, before model or data are touched."""
        check_bucket(self.paths)
        known = retry(self.paths, lambda: identity(self.paths, self.binding), self.check_stop)
        self.run_id = known or new_run_id(self.binding)
        found = newest_readable(self.paths, self.run_id, self.check_stop, self.config.on_nan != "ignore")
        self.newest = found[1] if found else None
        newest_step = self.newest.step if self.newest else 0
        launch = launch_id()
        facts: dict[str, Any] = {
            "config": self.config.to_json(),
            "binding": self.binding,
            "processes": self.world_size,
            "newest_step": newest_step,
        }
        opened = AttemptName.parse(os.environ.get("SKYSPOT_ATTEMPT", ""))
        if opened and self.ask(self.paths.attempt(opened).is_dir):
            self.attempt = self.ask(lambda: adopt(self.paths, opened, launch, **facts))
        else:
            self.attempt = open_attempt(self.paths, launch=launch, check_stop=self.check_stop, **facts)
        self.link.report_attempt(self.paths.root, self.attempt.name)
        self._refuse_other_binding(self.newest)
        from trainer.bucket.verify import problem

        def finished() -> bool:
            return is_finished(self.paths, self.run_id, self.binding, problem)

        if self.ask(finished, math.inf):  # Reads all of it; each read has a limit of its own.
            self.final_is_whole = True
            raise Leaving(ALREADY_FINISHED, f"already finished: {self.paths.final} is whole")
        attempt = self.attempt
        if self.ask(lambda: stop_requested(attempt)):
            asked = self.paths.stop(self.attempt.launch)
            raise Leaving(STOP_REQUEST, f"not started: {asked} asks this launch to stop")
        stuck = self.ask(lambda: no_progress(attempt, newest_step), RECORDS_S)
        if stuck:
            raise Leaving(NO_PROGRESS, stuck)
        self._hear_the_cloud(self.attempt.name, self.attempt.machine)

    def _hear_the_cloud(self, name: AttemptName, machine: str) -> None:
        """Ask the cloud's metadata service from now on: one rank on each machine, as each has notices of its own."""
        ignored = self.ask(lambda: ignored_notices(self.paths, name, machine), RECORDS_S)
        self.notices.ignored = frozenset(ignored)
        self.notices.poll_metadata()

    def _meet_the_other_machines(self) -> None:
        """Each machine looks at its own mount and its own notices, and is recorded.

        Raises:
            AttemptError: the bucket is not mounted here; the attempt ends with 1 on all machines.
        """
        machine = ""
        with self.group.before_gather("machine"):
            if self.group.local_rank == 0:
                machine = machine_token()
                if self.rank:
                    check_bucket(self.paths)
                    self._await_the_attempt_in_the_bucket()
                    self._hear_the_cloud(self.attempt_name, machine)
            tokens = self.group.gather("machine", machine, self.check_stop)
        if attempt := self.attempt:
            found = [token for token in tokens if token]
            self.ask(lambda: record(attempt, "machines", machines=found))

    def _await_the_attempt_in_the_bucket(self) -> None:
        """Two mounts of one bucket show each other's new files a little later; two buckets never do."""
        folder, end = self.paths.attempt(self.attempt_name), time.monotonic() + SEE_ATTEMPT_S
        while not self.ask(folder.is_dir):
            self.check_stop()
            if time.monotonic() > end:
                raise RunError(
                    f"{folder}: the first machine wrote it, and this one does not see it for {SEE_ATTEMPT_S:g} s. "
                    "What is mounted here is not the same bucket or folder; nothing was written"
                )
            time.sleep(0.2)

    # -- the end -------------------------------------------------------------------------------------------------------

    def hold(self, seconds: float) -> None:
        """Wait to be killed: the machine is going, and an early exit would only start a new attempt on it."""
        self.say("holding until this machine is taken")
        self.notices.signalled.wait(seconds)

    def leave(
        self,
        ending: Ending,
        *,
        code: int | None = None,
        error: str | None = None,
        notice: Notice | None = None,
        committed_s: float | None = None,
    ) -> NoReturn:
        """End this process; rank 0 writes the end event first. Never returns.

        Args:
            ending: Why.
            code: The exit code; None: the ending's.
            error: What to record of an error.
            notice: What announced the end.
            committed_s: How long after the notice the last step was committed.
        """
        code = ending.code if code is None else code
        with self._leaving:  # Held until the process is gone: whoever comes second waits here.
            self.write_end(ending, code=code, error=error, notice=notice, committed_s=committed_s)
            with suppress(Exception):
                across = self._across()
                if self.rank:
                    if across and self.stopping:
                        # The first machine to leave has SkyPilot kill the others: not before all is written.
                        self.group.read_message(END_WRITTEN, LEAVE_LAST_S)
                    self.group.mark_left()
                elif code == EXIT_DONE or self.stopping or across:
                    self.group.await_others_left(self._serve_on_s)
            scratch.remove_all()
            self.link.report_exit(code)
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            # Not sys.exit: it would join threads that may hang in a write to a dead mount.
            os._exit(code)

    def write_end(
        self,
        ending: Ending,
        *,
        code: int | None = None,
        error: str | None = None,
        notice: Notice | None = None,
        committed_s: float | None = None,
    ) -> None:
        """Write the attempt's end event, once, within a few seconds; arguments as of `leave`."""
        attempt, self.attempt = self.attempt, None
        if attempt is None:
            return
        fields = {
            "code": ending.code if code is None else code,
            "cause": ending.cause,
            "step": self.steps_done,
            "committed_step": self.committed_step,
            **({"skipped": self.skipped} if self.skipped else {}),
            "error": error[-4000:] if error else None,
            "notice": {"kind": notice.kind, "id": notice.id, "seconds_left": notice.seconds_left} if notice else None,
            "committed_s": None if committed_s is None else round(committed_s, 4),
        }

        def write() -> None:
            with suppress(OSError):
                if self.journal:
                    self.journal.flush(END_EVENT_S / 2)
                record(attempt, "end", **fields)
                self.link.report_end_written()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(END_EVENT_S)
        with suppress(Exception):
            self.group.post_message(END_WRITTEN, "")


def exit_code(error: BaseException) -> int:
    """With what an attempt ends that an error ended."""
    if isinstance(error, TrainerError):
        return error.code
    return EXIT_PREEMPTED if isinstance(error, OSError) and error.errno in MOUNT_GONE else EXIT_FAILED
