"""Closing: ends an attempt's training. A stop saves the last boundary; the last step exports the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from trainer.attempt.ending import STOP_REQUEST, STOPS, Hold, Leaving
from trainer.attempt.notices import Notice
from trainer.attempt.record import superseded
from trainer.checkpoint.finite import NotFiniteError
from trainer.layout.names import CheckpointName
from trainer.ranks.agreement import Stop
from trainer.training import export, finite
from trainer.training.checkpointer import Checkpointer
from trainer.training.participant import Participant
from trainer.training.report import Report
from trainer.training.training_state import TrainingState


class Closing:
    """The last things that an attempt does, in their order."""

    def __init__(
        self,
        run: Participant,
        state: TrainingState,
        checkpointer: Checkpointer,
        report: Report,
        save_model: Callable[..., None],
    ) -> None:
        self._run, self._state, self._checkpointer, self._report = run, state, checkpointer, report
        self._save_model = save_model

    def stop(self, stop: Stop) -> NoReturn:
        """Save the last boundary if it fits, and leave; never returns."""
        run, state, saver = self._run, self._state, self._checkpointer.saver
        self._report.close()
        if not stop.ending.saves:
            newer = run.journal.superseded_by if run.journal else None
            raise Leaving(stop.ending, superseded(newer))
        if stop.ending is STOP_REQUEST:
            self._stop_as_requested()
        notice = run.notices.first() or Notice(stop.kind, stop.kind, time.monotonic(), stop.deadline - time.monotonic())
        run.say(f"{stop.kind}: {max(0.0, stop.deadline - time.monotonic()):.0f} s left; saving step {state.done}")
        # One writer at a time; and rank 0's clock decides for all.
        saver.wait(max(0.0, stop.deadline - time.monotonic()))
        save_s = saver.commit_s or 0.0
        if run.group.rank0_does("last-save", lambda: save_s <= stop.deadline - time.monotonic()):
            self._checkpointer.save_last(stop.deadline)
        else:
            run.committed_step = saver.committed_step
            run.say(f"a save takes {save_s:.1f} s and does not fit: the last committed step is {run.committed_step}")
        committed_s = time.monotonic() - notice.at if saver.committed_step == state.done else None
        if committed_s is not None:
            run.say(f"step {state.done} is committed, {committed_s:.1f} s after the word")
        ending = STOPS[notice.kind]  # This rank's own: a signal may have come before another machine's notice.
        if ending.hold is Hold.MACHINE_TAKEN:
            run.write_end(ending, notice=notice, committed_s=committed_s)
            run.hold(ending.hold_s(stop.deadline))
        run.leave(ending, notice=notice, committed_s=committed_s)

    def _stop_as_requested(self) -> NoReturn:
        """Save, and hold until SkyPilot's cancel comes: leaving at once would show a failed job. Never returns."""
        run, done, saver = self._run, self._state.done, self._checkpointer.saver
        run.say(f"a stop was asked for: saving step {done}")
        self._checkpointer.save_last(None)
        run.write_end(STOP_REQUEST)
        saved = saver.committed_step == done
        said = f"step {done} is committed" if saved else f"the last committed step is {saver.committed_step}"
        run.say(f"{said}; waiting for SkyPilot to cancel this job")
        run.notices.signalled.wait(STOP_REQUEST.hold_s())
        run.leave(STOP_REQUEST)

    def finish(self, stop: Stop | None, again: bool) -> None:
        """Save the last checkpoint, then export the model.

        Args:
            stop: The stop that was agreed on meanwhile, if any.
            again: Whether the last boundary is saved once more, because more is known of it.
        """
        run, state, saver = self._run, self._state, self._checkpointer.saver
        self._checkpointer.save_last(stop.deadline if stop else None, again)
        while not stop and saver.committed_step != state.done:
            self._checkpointer.save(last=True)
            saver.wait()  # Raises once too many saves in a row have failed.
        # Rank 0's word: another rank may not have heard of the commit before the deadline.
        committed, is_finite = run.group.rank0_does(
            "last-committed", lambda: [saver.committed_step == state.done, saver.finite == saver.committed]
        )
        if not committed:
            assert stop
            self.stop(stop)
        if not is_finite and state.config.on_nan != finite.IGNORE:
            raise NotFiniteError(
                f"the weights after the last step ({state.done}) are not finite (NaN or infinite): nothing is "
                f"exported. {saver.last_finite()}: a relaunch goes on from there"
            )
        self._report.close()
        name = saver.committed
        # All steps are done: a stop that comes now is better answered by finishing.
        run.group.rank0_does("export", lambda: self._export(stop, name))
        run.final_is_whole = True
        run.say(f"finished: {state.done} steps, model in {run.paths.final}")
        saver.settle()

    def _export(self, stop: Stop | None, name: CheckpointName | None) -> None:
        """Rank 0: make `final/`; where this machine is going, what fails for that is for the next one to do."""
        assert name
        try:
            export.export(self._run, self._state.model, self._save_model, name)
        except Exception as error:
            notice = self._run.notices.first()
            stop = stop or (Stop(notice.kind, notice.deadline) if notice else None)
            if not stop:
                raise
            self._run.say(f"the model is not exported yet ({error}): the next attempt does it")
            self.stop(stop)
