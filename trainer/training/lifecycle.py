"""Lifecycle: one rank's process in an attempt: how it begins, what watches it, and how it ends.

SIGTERM is handled from the `with` block's beginning on; an earlier one ends the process, and the launcher exits with
75. This module imports torch only inside the block.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.attempt.binding import plain_binding
from trainer.attempt.ending import (
    ALREADY_FINISHED,
    ENDINGS,
    ERROR,
    FINISHED,
    HANG,
    MOUNT_HANGS,
    PEER_CRASHED,
    PEER_GONE,
    STOPS,
    SUPERSEDED,
    Leaving,
)
from trainer.bucket.deadlines import await_overdue
from trainer.errors import RunError, TrainerError, one_line
from trainer.launch.nodes import Nodes
from trainer.layout.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_FAILURES, EXIT_PRECEDENCE
from trainer.layout.identity import newest_committed
from trainer.layout.names import AttemptName
from trainer.machine import scratch
from trainer.ranks.messages import CRASHED, GAVE_UP, STOPPED
from trainer.training.hangs import PATIENCE_S, HangGuard
from trainer.training.opening import join_machines, open_or_refuse
from trainer.training.participant import Participant
from trainer.training.unwinding import Left, exit_code

if TYPE_CHECKING:
    from typing_extensions import Self

PEER_GONE_PATIENCE_S = 2.0
CRASH_PATIENCE_S = 5.0
LOOK_FOR_CRASHES_S = 0.2


class Lifecycle(Participant):
    """A rank's process as a context: it opens the attempt, and ends it with an exit code of README's table."""

    _has_given_up = False
    """This rank has told those of other machines that it leaves, as it has waited for one of them in vain."""

    def __enter__(self) -> Self:
        try:
            self.hangs = HangGuard(self.config.hang_timeout_s, self._on_hang)
            # Before SIGTERM is handled: to a rank that listens, the launcher passes no notice of the cloud on.
            self.link.watch(self._on_peer_gone, self.leave_at_once)
            self.notices.install()
            threading.Thread(target=self._watch_the_bucket, daemon=True, name="bucket").start()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                threading.Thread(target=scratch.remove_stale, daemon=True, name="stale").start()
            self._refuse_without_launcher()
            for note in filter(None, self.notes):
                self.print_line(note)
            self.binding = plain_binding(self.binding)
            opened, refusal = open_or_refuse(self) if self.rank == 0 else (None, None)
            self.check_stop()
            from trainer.machine import loader_workers
            from trainer.ranks.group import RankGroup
            from trainer.training.loading_here import load_here_at_stop

            loader_workers.protect_all()
            loader_workers.outlive_at_stop(self.notices.received)
            load_here_at_stop(self.notices.received)
            loader_workers.seed_each_epoch()
            self.group = RankGroup(self.config.peer_timeout_s, self.check_stop)
            self.living.enter_context(self.group.stay_alive())
            if self.group.unsupervised:
                self._crashes = threading.Thread(target=self._watch_for_crashes, daemon=True, name="crashes")
                self._crashes.start()
            answer = self.group.rank0_does("attempt", lambda: opened, self.check_stop)
            if refusal:
                raise refusal
            if isinstance(answer, list):
                cause, message, code = answer
                raise Leaving(ENDINGS[cause], message, code=code)
            name = AttemptName.parse(answer)
            assert name
            self.attempt_name = name
            if self.group.unsupervised:
                join_machines(self)
            if self.world_size > 1:
                self.loading.enter_context(self.group.before_gather("ready"))
            self.check_stop()
        except BaseException as error:
            self._end_with(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Left):
            return
        if self._exit is not None:  # The program has caught what the end of the attempt raised.
            self.leave(FINISHED)
        if error is None and not self.final_is_whole:
            call = "run.finish()" if self.has_own_loop else "run.train(...)"
            error = RunError(
                f"the `with SpotRun(...)` block ended before the training was done. Call {call} in it, and do not "
                "catch what that raises"
            )
        if error is not None:
            self._end_with(error)
        if not self.unwinds:
            self.leave(FINISHED)
        # Code after the block may go on for long. It belongs to no attempt.
        self._exit = FINISHED.code
        self.part(ALREADY_FINISHED if self.was_finished else FINISHED, FINISHED.code)
        self.give_back()

    def _refuse_without_launcher(self) -> None:
        if self.world_size == 1 and Nodes.from_env().several:
            raise RunError(
                "there are several machines, and each would train alone. Start the script with "
                "`python -m trainer.launch SCRIPT`"
            )

    # -- threads that may end the attempt ------------------------------------------------------------------------------

    def _watch_for_crashes(self) -> None:
        """Leave with 1 when a rank on any machine has crashed, even if this rank waits for something.

        A collective fails on the other machines before the crashed rank has left. If they then left with 75, SkyPilot
        would restart a bug for ever. Where a rank has only waited in vain, this one leaves with it: SkyPilot kills it
        once that machine is gone. If it is the one that stands still, its stacks tell where.
        """
        with suppress(Exception):
            store = self.group.connection()
            while True:
                crash = self.group.read_message(CRASHED, LOOK_FOR_CRASHES_S, store)
                if self._ending.is_set() or self.given_back.is_set():
                    return
                if crash is not None:
                    self._follow_crash(crash)
                if not self._has_given_up and self.group.read_message(GAVE_UP, store=store):
                    self._keep_stacks_if_still()
                    crash = self.group.read_message(CRASHED, CRASH_PATIENCE_S, store)
                    if crash is None:
                        self._on_peer_gone()
                    elif not self._ending.is_set():
                        self._follow_crash(crash)
                store.check([CRASHED])  # Raises where rank 0 is gone.

    def _watch_the_bucket(self) -> None:
        """Leave when a call into the bucket does not return: it cannot be interrupted, and a new machine remounts."""
        call = await_overdue(self.given_back)
        if call is None:
            return
        if self.final_is_whole:
            self.leave(FINISHED)
        seconds = time.monotonic() - call.begun
        error = f"{call.what} in {call.where or self.paths.root} has not returned for {seconds:.0f} s: its mount hangs"
        print(f"Error: {error}. Nothing that was committed is lost.", file=sys.stderr, flush=True)
        if call.code == EXIT_FAILED:
            self._report_crash(error)
        self.leave(MOUNT_HANGS, code=call.code, error=error)

    def _on_peer_gone(self) -> None:
        """Handle the message that another rank left: give the main thread a moment to leave, then leave."""
        self.peer_gone.set()
        time.sleep(PEER_GONE_PATIENCE_S if not self.stopping else self.grace_s)
        if not self.final_is_whole:
            if trouble := self.trouble():
                self._end_with(trouble)
            self._keep_stacks_if_still()
            self._leave_with_the_others("another rank is gone")

    def _on_hang(self, seconds: float) -> None:
        """Leave: training has stood still for so long. The other ranks stand still as well, and do the same."""
        if self._exit is not None or self.final_is_whole:
            return
        error = f"training has stood still for {seconds:.0f} s (--hang-timeout)"
        option = "SpotRun(..., hang_timeout=...)" if self.has_own_loop else "--hang-timeout"
        self._keep_stacks(error, f"If a step or an evaluation takes that long, raise {option}.")
        if self.world_size > 1:
            time.sleep(PATIENCE_S)
        self.leave(HANG, error=error)

    def _keep_stacks_if_still(self, cause: BaseException | None = None) -> None:
        """Keep the stacks as another rank is gone, if training stands still here.

        Where one rank hangs, the others give up after --peer-timeout, which is shorter than --hang-timeout: they keep
        their stacks, and it keeps its own as it follows them.

        Args:
            cause: What this rank gives up for; None: it follows another one, which may have begun to wait earlier.
        """
        seconds, limit_s = self.hangs.still_s, self.config.peer_timeout_s
        if seconds >= (limit_s if cause else limit_s / 2):
            error = f"training has stood still for {seconds:.0f} s, and another rank is gone"
            remedy = "If a step or an evaluation takes that long, raise --peer-timeout."
            if self.has_own_loop:
                remedy = "If rank 0 alone does something that takes that long, give it to run.rank0_does(...)."
            self._keep_stacks(error, remedy, cause)

    def _keep_stacks(self, error: str, remedy: str, cause: BaseException | None = None) -> None:
        """Keep the stacks of all threads in the attempt's folder, and say why and where; one rank says it for all."""
        path = self.paths.stacks(self.attempt_name, self.rank)
        kept = self.hangs.keep_stacks(path, cause)
        where = f"The stacks of all threads: {path}" if kept else "The bucket did not take the stacks"
        if self._is_first_to_print("hang"):
            print(
                f"Error: {error}. {where}, one file for each rank. {self.last_committed_line()} {remedy}",
                file=sys.stderr,
                flush=True,
            )

    # -- the end -------------------------------------------------------------------------------------------------------

    def _follow_crash(self, crash: str) -> NoReturn:
        """Leave because a rank that our launcher does not watch has crashed."""
        if self.rank == 0:
            print(f"Error: {crash} (the traceback is in that rank's output)", file=sys.stderr)
        self.leave(PEER_CRASHED, error=crash)

    def _leave_with_the_others(self, error: str) -> NoReturn:
        """Leave because another rank is gone: with the agreed stop if there is one, else as at a preemption."""
        ending = self.stopping
        if not ending and self._is_unsupervised() and (message := self.group.read_message(STOPPED)):
            ending = ENDINGS[json.loads(message)[0]]
        self.leave(ending or PEER_GONE, error=error)

    def _end_with(self, error: BaseException) -> NoReturn:
        """End the attempt because of an error: print it once, and leave with its exit code."""
        error = self._as_stop(explained(error))
        # A rank that left because of the same error is no lost peer: a mistake hits all ranks, one a little later.
        lost = self._may_be_peer_trouble(error) and self.group.lost_a_peer(self.peer_gone)
        if lost and not self.link.was_printed(one_line(error)):
            error = sys.modules["trainer.ranks.peers"].PeerGoneError(one_line(error))
        if self.world_size > 1 and self._is_peer_trouble(error):
            error = self.trouble() or error
        if not (self.world_size > 1 and self._is_peer_trouble(error)):
            self._ending.set()
        if isinstance(error, Leaving):
            self._end_with_leaving(error)
        if isinstance(error, SystemExit):
            code = exit_status(error)
            if not (code or self.final_is_whole):  # After a 0, SkyPilot would mark the run as done.
                error = RunError("the script called sys.exit(0) before the training was done: the attempt ends with 1")
            else:
                self._end_with_exit(code, error)
        if self.world_size > 1 and self._is_peer_trouble(error):
            if self._is_unsupervised():
                patience_s = 0.0 if self.stopping or self.group.read_message(STOPPED) else CRASH_PATIENCE_S
                if patience_s:
                    self._has_given_up = True
                    self.group.post_message(GAVE_UP, f"rank {self.rank}: {one_line(error)}")
                crash = self.group.read_message(CRASHED, patience_s)
                self._serve_on_s -= patience_s  # The others have waited as long meanwhile.
                if crash is not None:
                    self._follow_crash(crash)
            elif not hasattr(self, "group"):
                print(f"rank {self.rank}: {error}", file=sys.stderr)
            self._keep_stacks_if_still(error)
            self._leave_with_the_others(f"another rank is gone ({one_line(error)})")
        code = exit_code(error)
        # Printed before the others learn of it: when one machine leaves, SkyPilot kills the others.
        is_one_line, is_first = isinstance(error, TrainerError), self._is_first_to_print(one_line(error))
        if is_first and is_one_line:
            print(f"Error: {error}", file=sys.stderr, flush=True)
        elif is_first:
            traceback.print_exception(error)
        if code == EXIT_FAILED:
            self._report_crash(one_line(error))
        if is_first and not is_one_line:
            print(
                f"Error: {one_line(error)}. {self._remedy(error)}{self._newest_checkpoint()}",
                file=sys.stderr,
                flush=True,
            )
        self.leave(SUPERSEDED if code == SUPERSEDED.code else ERROR, code=code, error=one_line(error))

    def _as_stop(self, error: BaseException) -> BaseException:
        """The stop that this rank has heard of, where a loader's worker has died at it; any other error as it is."""
        if not hasattr(self, "group"):
            return error
        from trainer.machine import loader_workers

        if not loader_workers.died_at_stop(error, self.notices.received):
            return error
        notice = self.notices.first()
        assert notice
        ending = STOPS[notice.kind]
        message = f"{one_line(error)}. That is part of the stop ({notice.kind}). {self.last_committed_line()}"
        return Leaving(ending, message, notice=notice, hold_s=ending.hold_s(notice.deadline))

    def _end_with_leaving(self, leaving: Leaving) -> NoReturn:
        """End the attempt as a `Leaving` says."""
        if leaving.message and self.rank == 0:
            failed = leaving.code in EXIT_FAILURES
            print(f"Error: {leaving.message}" if failed else leaving.message, file=sys.stderr if failed else sys.stdout)
        if leaving.code == EXIT_FAILED:
            self._report_crash(leaving.message)
        end: dict[str, Any] = {"code": leaving.code, "error": leaving.message or None, "notice": leaving.notice}
        if leaving.hold_s:
            self.hold(leaving.hold_s, leaving.ending, **end)
        self.leave(leaving.ending, **end)

    def _end_with_exit(self, code: int, error: SystemExit) -> NoReturn:
        """End the attempt as the script's sys.exit asks."""
        if not isinstance(error.code, int) and error.code is not None and self._is_first_to_print(str(error.code)):
            print(error.code, file=sys.stderr, flush=True)
        if code and code not in EXIT_PRECEDENCE[1:]:
            self._report_crash(f"exit {error.code}")
        self.leave(FINISHED if code == 0 else ERROR, code=code, error=str(error.code))

    def _is_first_to_print(self, message: str) -> bool:
        """True if no other rank has printed the message: a mistake that hits all ranks is printed once.

        It asks the launcher's file first: on one machine, a rank 0 that fails does not wait for the others, and its
        store is gone with it.
        """
        if not self.link.is_first_to_print(message):
            return False
        with suppress(Exception):  # If the store is gone, twice is better than not at all.
            return self.group.is_first(f"printed/{message}")
        return True

    def _report_crash(self, error: str) -> None:
        """Tell ranks that no launcher of ours watches that this is no preemption, before they see this one leave."""
        if self._is_unsupervised():
            self.group.post_message(CRASHED, f"rank {self.rank}: {error}")

    def _is_peer_trouble(self, error: BaseException) -> bool:
        module = sys.modules.get("trainer.ranks.peers")
        return module is not None and bool(module.is_peer_trouble(error))

    def _remedy(self, error: BaseException) -> str:
        """A sentence on what to do where memory ran out, or that names the local disk that is full; else empty."""
        if type(error).__name__ == "OutOfMemoryError" and not self.has_own_loop:
            return "--micro-batch-size auto takes as many samples as fit. "
        if isinstance(error, OSError) and error.errno in scratch.FULL and not error.filename:
            where = scratch.full_place(self.paths.root)
            return f"{where} is full. " if where else ""
        return ""

    def _may_be_peer_trouble(self, error: BaseException) -> bool:
        """True if a lost peer may have caused the error: only a look at the other ranks can tell."""
        if self.world_size == 1 or not hasattr(self, "group"):
            return False
        if isinstance(error, (Leaving, TrainerError)):
            return False
        module = sys.modules["trainer.ranks.peers"]
        return bool(module.may_be_peer_trouble(error)) and not module.is_peer_trouble(error)

    def _newest_checkpoint(self) -> str:
        """A sentence that names the newest committed checkpoint."""
        newest = None
        with suppress(Exception):  # The error may come from the bucket.
            newest = newest_committed(self.paths)
        return f"The last committed checkpoint is {newest[0]}." if newest else "No checkpoint has been committed."


def explained(error: BaseException) -> BaseException:
    """An error of torch's that a mistake in the program causes, in a line with the remedy; any other error as it is."""
    if type(error) is RuntimeError and str(error).startswith("Expected to have finished reduction"):
        return RunError(
            "a parameter got no gradient in the step before, and the processes waited for one. Give "
            "find_unused_parameters=True to DistributedDataParallel or to train(). With accelerate: "
            "Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])"
        )
    return error


def exit_status(error: SystemExit) -> int:
    """The exit status of a process: 1 after a message; never 0 for a number that the system would cut to 0."""
    if not isinstance(error.code, int):
        return EXIT_DONE if error.code is None else EXIT_FAILED
    return error.code & 0xFF or int(bool(error.code))
