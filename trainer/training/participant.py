"""Participant: one rank's part in an attempt. It checks for a stop, compares what binds the run, and leaves."""

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
from typing import Any, NoReturn

from trainer.attempt.binding import binding_problem, plain_binding
from trainer.attempt.ending import END_EVENT_S, ENDINGS, NOTICE, PEER_GONE, REFUSED, SIGNAL, STOPS, Ending, Leaving
from trainer.attempt.history import RECORDS_S
from trainer.attempt.record import Attempt, record, stop_reason
from trainer.bucket.deadlines import within
from trainer.bucket.retry import retry
from trainer.launch.grace import grace
from trainer.launch.link import Link
from trainer.layout.clouds import set_gcp_notice
from trainer.layout.exit_codes import EXIT_DONE
from trainer.layout.manifest import Manifest
from trainer.layout.names import RunPaths
from trainer.machine import scratch
from trainer.machine.flag import Flag
from trainer.notices.notice import Notice
from trainer.notices.presses import PRESSES
from trainer.notices.received import Notices
from trainer.ranks.agreement import Stop
from trainer.ranks.messages import END_WRITTEN, HEARD, RELEASED, STOPPED, TOO_LARGE
from trainer.training.config import INPUT_BINDINGS, RunConfig, unknown_field
from trainer.training.host import Host
from trainer.training.taken_at import TakenAt
from trainer.training.unwinding import hosted, unwind

LEAVE_LAST_S = 6.0
END_THREADS_S = 2.0
LOOK_AT_STORE_S, LOOK_AT_BUCKET_S = 0.5, 5.0
REQUESTED_STOP_S = 120.0
"""The time that a requested stop may take."""


class Participant(Host):
    """This process among those of an attempt.

    Attributes:
        rank, world_size: Its number among them, and how many they are.
        grace_s: Seconds from SIGTERM to SIGKILL: the smaller of the launcher's and the config's.
        paths: The run's folder.
        attempt: Rank 0's record of the attempt; None on other ranks.
    """

    def __init__(self, config: RunConfig, binding: dict[str, Any]) -> None:
        super().__init__(RunPaths(config.checkpoint_dir), binding)
        self.grace_s, grace_note = grace(config.grace_s)
        self.notes = [grace_note]
        """Lines for the user, printed when the attempt begins; empty ones are not."""
        self.config = dataclasses.replace(config, grace_s=self.grace_s)
        self.report_to = config.report_to
        set_gcp_notice(config.gcp_notice_s)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.launched_at = float(os.environ.get("SKYSPOT_LAUNCHED_AT", time.monotonic()))
        self.allowed = set(config.allow_config_change)
        """The fields that may differ from the run's first attempt."""
        self.is_same: Callable[[str, Mapping[str, Any]], bool] = lambda name, first: False
        """Returns whether a field that differs from the first attempt's is the same thing under another name."""
        self.newest: Manifest | None = None
        """Rank 0: the manifest of the newest checkpoint when the attempt began."""
        self.link = Link.from_env()
        self.notices = Notices(self.grace_s)
        self.notices.on_notice = lambda notice: self.link.report_notice(notice.seconds_left)
        self.notices.on_presses = self.leave_at_once
        self.stop_received, self.hinted = self.notices.received, self.notices.hinted
        self.peer_gone = threading.Event()
        self.final_is_whole = False
        self.was_finished = False
        """Training was over when the attempt began."""
        self.unwinds = False
        """The program has code after the run: this process ends as Python ends it."""
        self.whole_final: Manifest | None = None
        """Rank 0: the manifest of `final/`, if it was whole when the attempt began and `unwinds` is set."""
        self.has_steps = threading.Event()
        """Set once steps tell the other ranks of a stop, or all are done."""
        self._exit: int | None = None
        """The exit code, once the attempt has ended."""
        self.skipped = 0
        """Steps of the run whose update was dropped because it was not finite."""
        self._leaving = threading.Lock()
        self._ending = threading.Event()
        """Set once this rank leaves for a reason of its own, which it is about to report."""
        self.given_back = threading.Event()
        """Set once the process belongs to the program alone: the attempt's threads end."""
        self._crashes: threading.Thread | None = None
        self._serve_on_s = LEAVE_LAST_S
        """The time for which rank 0 serves the store for the others after it has ended."""
        self._taken_at = TakenAt()
        self.loading, self.living = ExitStack(), ExitStack()
        """Heartbeats: until this rank is ready for the first collective; until its process ends."""
        self._look_at_store = self._look_at_bucket = 0.0

    # -- a stop, and what binds ----------------------------------------------------------------------------------------

    def check_stop(self) -> None:
        """Raise if it is time to stop. Called between two pieces of work outside the training loop; saves nothing.

        Raises:
            Leaving: a notice arrived, here or at another rank; a newer attempt has begun; or a stop was requested.
        """
        if not self.final_is_whole:
            notice = self.notices.first()
            if not (notice and STOPS[notice.kind] is NOTICE):
                self._check_other_ranks(notice)
            if notice:
                self._stop_all(STOPS[notice.kind], f"{notice.kind} before the first step", notice)
            if self.attempt:
                self._check_requests(self.attempt)
        if self.peer_gone.is_set():
            raise Leaving(PEER_GONE, "another rank is gone")

    def _check_other_ranks(self, signal: Notice | None) -> None:
        """Leave where another rank has stopped; looks at the store twice a second, and once this rank has a signal.

        Beside a signal, only a rank that holds counts: this one would end its hold.
        """
        if hasattr(self, "group") and (signal or time.monotonic() >= self._look_at_store):
            self._look_at_store = time.monotonic() + LOOK_AT_STORE_S
            if message := self.group.read_message(STOPPED):
                cause, hold_s = json.loads(message)
                if hold_s or not signal:
                    raise Leaving(ENDINGS[cause], "another rank stopped before the first step", hold_s=hold_s)

    def _check_requests(self, attempt: Attempt) -> None:
        """Rank 0: look for a reason to stop; once steps have begun, `own_stop` tells the others of what is found."""
        found = None
        if self.journal and not self.has_steps.is_set():
            found = self.journal.stop_reason
        elif self.journal is None and time.monotonic() >= self._look_at_bucket:
            self._look_at_bucket = time.monotonic() + LOOK_AT_BUCKET_S
            with suppress(OSError), within("looking for other attempts"):
                found = stop_reason(attempt)
        if found and not (self.whole_final and found.deadline):  # A finished run is finished, whatever it has cost.
            self._stop_all(found.ending, found.message)

    def _stop_all(self, ending: Ending, message: str, notice: Notice | None = None) -> NoReturn:
        """Leave, and have the other ranks leave for the same reason; where this one holds, they hold as long."""
        hold_s = ending.hold_s(notice.deadline) if notice else 0.0
        if hasattr(self, "group"):
            self.group.post_message(STOPPED, json.dumps([ending.cause, hold_s]))
        raise Leaving(ending, message, notice=notice, hold_s=hold_s)

    def _is_unsupervised(self) -> bool:
        """True if no launcher of ours watches all ranks, and this rank has joined their group."""
        return hasattr(self, "group") and self.group.unsupervised

    def await_all_ready(self) -> None:
        """Wait for the other ranks before the first collective, as long as each sends heartbeats while it loads."""
        self.group.gather("ready", True, self.check_stop)
        self.loading.close()

    def retry(self, work: Callable[[], Any], limit_s: float | None = None) -> Any:
        """Do something in the bucket between the attempt's start and its first step; see `bucket.retry.retry`.

        Args:
            work: The work; it may be done several times.
            limit_s: How long one try may take; infinite where each of its calls has its own limit.
        """
        return retry(self.paths, work, self.check_stop, begun=True, limit_s=limit_s)

    def print_line(self, text: str) -> None:
        """Print a line; ranks other than 0 print nothing. It works before the group is there."""
        if self.rank == 0:
            from trainer.training.console import print_line

            print_line(text)

    def note_finished(self) -> None:
        """Say that training was over when the attempt began, as all ranks have agreed."""
        self.final_is_whole = self.was_finished = True
        self.print_line(f"already finished: {self.paths.final} is whole")

    def own_stop(self) -> Stop | None:
        """This rank's notice, or what rank 0 found in the bucket; as of `Host.own_stop`."""
        self.has_steps.set()
        notice, found = self.notices.first(), self.journal.stop_reason if self.journal else None
        now = time.monotonic()
        if found and not found.ending.saves:
            return Stop(found.ending.cause, 0.0, now)  # No other deadline is earlier, and rank 0's row is the first.
        if notice:
            if self.rank and not self.stopping and STOPS[notice.kind] is NOTICE:
                self.group.post_message(HEARD, notice.id)  # Before the row: rank 0 finds it once it knows of the stop.
            return Stop(notice.kind, notice.deadline, notice.at)
        return Stop(found.ending.cause, found.deadline or now + REQUESTED_STOP_S, now) if found else None

    def deadline(self, stop: Stop) -> float:
        """As of `Host.deadline`: a cloud's notice that is heard after a signal counts, be it later or earlier."""
        if stop.ending is not SIGNAL:
            return stop.deadline
        notice = self.notices.first()
        taken_at = self._taken_at.look(self.group, notice if notice and STOPS[notice.kind] is NOTICE else None)
        return taken_at if math.isfinite(taken_at) else stop.deadline

    def bind(self, **values: Any) -> None:
        """Add a value to what binds the run, once it is known (the data's key, for example).

        Raises:
            Leaving: the run was started with another value; the attempt is refused.
        """
        self.binding.update(plain_binding(values))
        if self.rank == 0:
            assert self.attempt
            attempt = self.attempt
            self.retry(lambda: record(attempt, "bound", binding=self.binding))
            self.refuse_other_binding()

    def refuse_unknown_names(self) -> None:
        """Refuse an unknown name in `allow_config_change`, once everything that binds the run is known.

        Raises:
            Leaving: a name is unknown; the attempt is refused.
        """
        saved = self.newest.facts.get("binding") if self.newest else None
        known = {item.name for item in dataclasses.fields(self.config)} | self.binding.keys() | INPUT_BINDINGS
        known |= saved.keys() if isinstance(saved, Mapping) else set()
        if trouble := unknown_field(self.config.allow_config_change, known):
            raise Leaving(REFUSED, trouble)

    def refuse_other_binding(self) -> None:
        """Rank 0: refuse the attempt where a value that binds the run is not the run's.

        Raises:
            Leaving: the attempt is refused.
        """
        assert self.attempt
        attempt = self.attempt

        def remedy(name: str) -> str:
            allowing = f'give SpotRun(allow_config_change=["{name}"])'
            return f"{self.remedies[name]}, or {allowing}" if name in self.remedies else allowing

        def problem() -> str | None:
            more = {"remedy": remedy} if self.has_own_loop else {}
            return binding_problem(self.paths, attempt, self.binding, self.allowed, self.newest, self.is_same, **more)

        trouble = self.retry(problem, RECORDS_S)
        if trouble:
            raise Leaving(REFUSED, trouble)

    # -- the end -------------------------------------------------------------------------------------------------------

    def hold(self, seconds: float, ending: Ending, **end: Any) -> None:
        """Write the end event, and wait to be killed: an earlier exit would only start a new attempt on this machine.

        A signal that came before changes nothing. One that comes now ends the hold; rank 0 tells the others, as they
        may begin a moment later. The arguments are those of `write_end`, after the longest wait in seconds.
        """
        until = time.monotonic() + seconds
        self.notices.signalled = Flag()
        self.write_end(ending, **end)
        self.end_tracking(is_finished=False, deadline=until)
        self.print_line("holding until this machine is taken")
        while (left := until - time.monotonic()) > 0 and not self.notices.signalled.wait(min(left, LOOK_AT_STORE_S)):
            if self.rank and hasattr(self, "group") and self.group.read_message(RELEASED):
                break
        if self.rank == 0 and hasattr(self, "group"):
            self.group.post_message(RELEASED, "")

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
            ending: The cause.
            code: The exit code; None: that of the ending.
            error: The error to record.
            notice: The notice that announced the end.
            committed_s: Seconds from the notice to the commit of the last step.
        """
        code = ending.code if code is None else code
        if self._exit is not None and threading.current_thread() is not threading.main_thread():
            threading.Event().wait()  # The main thread ends the process.
        with self._leaving:  # Held until the process is gone, or the main thread unwinds: a second thread waits here.
            if self._exit is None:
                self._exit = code
                self.part(ending, code, error, notice, committed_s)
            if self.unwinds and threading.current_thread() is threading.main_thread():
                if hosted():
                    self.give_back()
                unwind(self._exit, self.link.report_exit)
            self.link.report_exit(self._exit)
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            # Not sys.exit, which would join threads that may hang in a write to a dead mount.
            os._exit(self._exit)

    def leave_at_once(self) -> None:
        """Leave without a save, because Ctrl-C was pressed again and again; a process that others share stays."""
        if hosted() or self._exit is not None:
            return
        with suppress(Exception):
            self.print_line(f"Ctrl-C {PRESSES} times: leaving at once. {self.last_committed_line()}")
        if not self.link.is_connected:  # The launcher records the end otherwise.
            self.write_end(SIGNAL)
        self.link.report_exit(SIGNAL.code)
        os._exit(SIGNAL.code)

    def last_committed_line(self) -> str:
        """Return a sentence that names the last committed step."""
        step = self.last_committed()
        return f"The last committed step is {step}." if step else "No step is committed yet."

    def part(
        self,
        ending: Ending,
        code: int,
        error: str | None = None,
        notice: Notice | None = None,
        committed_s: float | None = None,
    ) -> None:
        """End the attempt, but not the process; the arguments are those of `leave`."""
        self.write_end(ending, code=code, error=error, notice=notice, committed_s=committed_s)
        self.end_tracking(code == EXIT_DONE, notice.deadline if notice else None)
        with suppress(Exception):
            across = self._is_unsupervised()
            if self.rank:
                if across and self.stopping:
                    # When one machine leaves, SkyPilot kills the others: first let rank 0 write the end event.
                    self.group.read_message(END_WRITTEN, LEAVE_LAST_S)
                self.group.mark_left()
            elif code == EXIT_DONE or self.stopping or across:
                self.group.await_others_left(self._serve_on_s)
        scratch.remove_all()

    def give_back(self) -> None:
        """Leave the process to the program, after the attempt's end: end the threads, and handle signals as before.

        Only in a `hosted` process are signals handled as before: elsewhere, code after the block keeps its grace.
        """
        self.given_back.set()
        if hosted():
            self.notices.end()
        if self.journal:
            self.journal.end()
        # If Python ends while a thread is in a call of c10d's, the process aborts.
        if hasattr(self, "group"):
            self.group.let_go(END_THREADS_S)
        if self._crashes:
            self._crashes.join(END_THREADS_S)

    def write_end(
        self,
        ending: Ending,
        *,
        code: int | None = None,
        error: str | None = None,
        notice: Notice | None = None,
        committed_s: float | None = None,
    ) -> None:
        """Write the attempt's end event, once, within a few seconds; the arguments are those of `leave`."""
        self.hangs.end()
        attempt, self.attempt = self.attempt, None
        if attempt is None:
            return
        fields = {
            "code": ending.code if code is None else code,
            "cause": ending.cause,
            "step": self.steps_done,
            "committed_step": self.last_committed(),
            **({"skipped": self.skipped} if self.skipped else {}),
            "error": error[-4000:] if error else None,
            "notice": {"kind": notice.kind, "id": notice.id, "seconds_left": notice.seconds_left} if notice else None,
            "committed_s": None if committed_s is None else round(committed_s, 4),
        }
        with suppress(Exception):  # There is no group yet, or nothing was posted.
            fields["micro_batch_too_large"] = int(self.group.read_message(TOO_LARGE) or "")

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
