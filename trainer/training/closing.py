"""Closing: ends the training of an attempt. At a stop it saves the last boundary; after the last step it exports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from trainer.attempt.ending import NOTICE, STOPS, Ending, Hold, Leaving
from trainer.checkpoint.finite import NotFiniteError
from trainer.layout.exit_codes import EXIT_STOPPED
from trainer.layout.names import CheckpointName
from trainer.notices.notice import Notice
from trainer.ranks.agreement import Stop
from trainer.ranks.messages import HEARD
from trainer.training.contents import Contents
from trainer.training.fit import save_line
from trainer.training.participant import Participant
from trainer.training.session import Session

RECORD_S = 1.0
"""The time that the record of the last save may take at a stop."""

Export = Callable[[CheckpointName], None]
"""Writes `final/`, on rank 0; it gets the name of the run's last checkpoint."""


def is_finished(run: Participant, done: int, until: int | None) -> bool:
    """True if `final/` is whole and was exported from this step, with this end of training. Every rank calls it."""
    if not run.final_is_whole:

        def look() -> bool:
            final = run.whole_final
            config = final.facts.get("config") if final else None
            known = config.get("max_steps") if isinstance(config, Mapping) else None
            return final is not None and (final.step, known) == (done, until)

        if run.group.rank0_does("finished", look, run.check_stop):
            run.note_finished()
    return run.final_is_whole


def is_trained(run: Participant, max_steps: int) -> bool:
    """True if `final/` is whole and was exported where `train` ends. Every rank calls it."""

    def look() -> bool:
        final = run.whole_final
        return final is not None and final.facts.get("until", final.step) == max_steps

    if run.group.rank0_does("finished", look, run.check_stop):
        run.note_finished()
    return run.final_is_whole


class Closing:
    """Saves, exports and leaves, in the right order."""

    def __init__(
        self, run: Participant, session: Session, contents: Contents, close: Callable[[], None], export: Export
    ) -> None:
        """Describe the end.

        Args:
            run: This process.
            session: Saves the contents.
            contents: What steps change.
            close: Called once no step follows, before the last lines are printed.
            export: Called after the last step.
        """
        self._run, self._session, self._contents, self._close, self._export = run, session, contents, close, export

    def stop(self, stop: Stop) -> NoReturn:
        """Save the last boundary if there is time, and leave. Never returns."""
        run, contents, saver = self._run, self._contents, self._session.saver
        self._close()
        run.hangs.rest()
        if not stop.ending.saves:
            found = run.journal.stop_reason if run.journal else None
            raise Leaving(stop.ending, found.message if found else "")
        if stop.ending.code == EXIT_STOPPED:
            self._stop_as_requested(stop.ending)
        own = run.notices.first() or self._notice_of_another(stop)
        self._record_notice(own, run.deadline(stop))
        left_s = max(0.0, run.deadline(stop) - time.monotonic())
        under_way = None if saver.idle else self._session.saved_at
        run.print_line(save_line(stop.kind, left_s, saver.save_s, contents.done, under_way))
        # There is one writer at a time, and rank 0's clock decides for all ranks.
        self._session.wait(stop)
        # However long the save before took: it had training beside it, and a try that is cut off costs nothing.
        if run.group.rank0_does("last-save", lambda: run.deadline(stop) > time.monotonic()):
            if run.journal and saver.committed_step != contents.done:
                run.journal.event("save-begin", step=contents.done, at=round(time.time(), 3))
            self._session.save_last(stop)
        run.committed_step = saver.committed_step
        committed_s = time.monotonic() - own.at if saver.committed_step == contents.done else None
        if committed_s is not None:
            run.print_line(f"Step {contents.done} committed {committed_s:.1f} s after the notice.")
            saver.await_record(min(RECORD_S, run.deadline(stop) - time.monotonic()))
        elif contents.done:
            run.print_line(f"Step {contents.done} was not committed in time. {run.last_committed_line()}")
        notice = run.notices.first() or own
        ending = STOPS[notice.kind]  # Of this rank's notice: it may have got a signal before another machine's notice.
        if ending.hold is Hold.MACHINE_TAKEN:
            run.hold(ending.hold_s(run.deadline(stop)), ending, notice=notice, committed_s=committed_s)
        run.leave(ending, notice=notice, committed_s=committed_s)

    def _notice_of_another(self, stop: Stop) -> Notice:
        """The notice that another rank has heard; a signal's id is its kind."""
        known = self._run.group.read_message(HEARD) if stop.ending is NOTICE else None
        return Notice(stop.kind, known or stop.kind, stop.heard_at, stop.deadline - stop.heard_at)

    def _record_notice(self, notice: Notice, deadline: float) -> None:
        """Rank 0: record what was heard, when, and until when; beside the save, which does not wait for it."""
        unix = time.time() - time.monotonic()
        if self._run.journal:
            self._run.journal.event(
                "notice", kind=notice.kind, id=notice.id, heard=round(unix + notice.at, 3),
                deadline=round(unix + deadline, 3), step=self._contents.done,
            )  # fmt: skip

    def _stop_as_requested(self, ending: Ending) -> NoReturn:
        """Save, and after a request wait for SkyPilot's cancel: a job that leaves earlier would show as failed.

        Never returns.
        """
        run, done, saver = self._run, self._contents.done, self._session.saver
        found, cancels = run.journal.stop_reason if run.journal else None, ending.hold is Hold.JOB_CANCELLED
        why = "Stop requested" if cancels or not found else f"{found.message[:1].upper()}{found.message[1:]}"
        run.print_line(f"{why}; saving step {done}.")
        self._session.save_last(None)
        run.write_end(ending)
        saved = saver.committed_step == done
        result = f"Step {done} committed" if saved else f"The last committed step is {saver.committed_step}"
        run.print_line(f"{result}; waiting for SkyPilot to cancel this job." if cancels else f"{result}.")
        if cancels:
            run.notices.signalled.wait(ending.hold_s())
        run.leave(ending)

    def finish(self, stop: Stop | None, resave: bool) -> None:
        """Save the last checkpoint, then export the model.

        Args:
            stop: The stop that was agreed on meanwhile, if any.
            resave: Save the last boundary once more, because an evaluation has changed its state.
        """
        run, contents, saver = self._run, self._contents, self._session.saver
        run.hangs.rest()
        run.has_steps.set()
        self._session.save_last(stop, resave)
        while not stop and saver.committed_step != contents.done:
            self._session.save(last=True)
            saver.wait()  # Raises once too many saves in a row have failed.
        # Rank 0 decides: another rank may not have learnt of the commit before the deadline.
        committed, is_finite = run.group.rank0_does(
            "last-committed", lambda: [saver.committed_step == contents.done, saver.finite == saver.committed]
        )
        if not committed:
            assert stop
            self.stop(stop)
        if not is_finite and contents.only_finite:
            raise NotFiniteError(
                f"the weights after the last step ({contents.done}) are not finite (NaN or infinite): nothing is "
                f"exported. {saver.last_finite()}; a relaunch resumes there"
            )
        self._close()
        name = saver.committed
        # All steps are done, so a stop that comes now does not interrupt the export.
        run.group.rank0_does("export", lambda: self._export_final(stop, name))
        run.final_is_whole = True
        run.print_line(f"finished: {contents.done} steps, model in {run.paths.final}")
        saver.settle(at_end=True)

    def _export_final(self, stop: Stop | None, name: CheckpointName | None) -> None:
        """Rank 0: write `final/`. Where that fails while this machine is being taken, the next attempt does it."""
        assert name
        try:
            self._export(name)
        except Exception as error:
            notice = self._run.notices.first()
            stop = stop or (Stop(notice.kind, notice.deadline, notice.at) if notice else None)
            if not stop:
                raise
            self._run.print_line(f"The model is not exported yet ({error}). The next attempt will export it.")
            self.stop(stop)
