"""FolderLoop: what a framework's callback uses of an attempt, where the loop and the checkpoint's files are its own.

On every rank, in this order:

    loop = run._framework_loop("lightning")     # in the callback's constructor
    folder = loop.fetch()                      # run.resume_from(): the newest whole checkpoint on a local disk, or None
    loop.begin(write, until)                   # before the first step; `write` has the framework write its files
    if loop.is_finished(): ...                 # nothing is left to train
    loop.start_step()                          # before the optimizer's step: the ranks agree meanwhile
    loop.end_step(lr)                          # after it: counts the step
    loop.begin_micro_step(left)                # before each batch of a step, and after it: leaves at a stop
    loop.end_micro_step(left, is_kept, go_back)
    if loop.wants_save: loop.save()            # after the evaluation of this step, if there is one; leaves at a stop
    loop.look()                                # between two batches of an evaluation: leaves at a stop
    loop.finish(export)                        # run.finish()

`write(folder)` is called by `save`, `look` and `finish`. It may write for long, and only to the folder that it gets.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trainer.attempt.binding import first_binding
from trainer.attempt.history import RECORDS_S
from trainer.errors import RunError
from trainer.layout.names import CheckpointName
from trainer.training import export
from trainer.training.closing import Closing, is_finished
from trainer.training.folder import Folder, Write
from trainer.training.joining import join, open_session
from trainer.training.participant import Participant
from trainer.training.step_end import StepEnd
from trainer.training.step_log import StepLog
from trainer.training.step_trace import StepTrace


class FolderLoop:
    """One attempt of a program that trains in a framework's loop."""

    def __init__(self, run: Participant, framework: str, state: dict[str, Any]) -> None:
        """Join the other ranks.

        Args:
            run: The attempt.
            framework: The name of what writes and reads the checkpoint's files.
            state: Plain values that are saved too.
        """
        self.run, config = run, run.config
        join(run)
        self.contents = Folder(run.group, framework, config.to_json(), state)
        self._session = open_session(run, self.contents, config.save_interval_steps, self.contents.memory)
        self._closing = Closing(run, self._session, self.contents, self._close, lambda name: self._export(name))
        self._export: Callable[[CheckpointName], None] = lambda name: None
        self.export_files: Callable[[Path], None] | None = None
        """Writes the trained model on rank 0 if `finish` gets no function for that."""
        self.is_restored = self._is_bound = False
        self._step_log: StepLog | None = None
        self._step_end: StepEnd | None = None
        """Once the run is restored."""
        self._until: int | None = None
        self._counted: tuple[int, float, float | None] | None = None
        """The step that is not published yet: its number, seconds and learning rate; metrics may still follow."""
        self._trace, self._traced = StepTrace(), dict[str, Any]()
        self._logged: dict[str, Any] = {}

    # -- before the first step -----------------------------------------------------------------------------------------

    def first_value(self, name: str) -> Any:
        """What the run was started with, of the values that bind it; None if that is not known."""
        run = self.run

        def look() -> Any:
            assert run.attempt
            first = first_binding(run.paths, run.attempt, run.newest)
            return first.get(name) if first else None

        return run.group.rank0_does("first-value", lambda: run.retry(look, RECORDS_S), run.check_stop)

    def bind(self, **values: Any) -> None:
        """Add values to what binds the run; called once, before `fetch`.

        Raises:
            Leaving: the run was started with another value.
        """
        self._is_bound = True
        self.run.group.rank0_does("bind", lambda: self.run.bind(**values), self.run.check_stop)

    def fetch(self) -> Path | None:
        """Restore the run: return the local folder with the files of the newest whole checkpoint; None without one.

        Raises:
            StateError: something else than this framework saved it.
            ReadError: there are checkpoints, and none can be read.
        """
        run = self.run
        if not self.is_restored:
            self.is_restored = True
            if not self._is_bound:
                self.bind()
            newest = run.newest
            self.contents.open(run.group.rank0_does("bytes", lambda: newest.total_bytes if newest else 0))
            self._session.restore()
            self._step_end = StepEnd(run, self.contents, self._session)
        return self.contents.fetched if self.contents.done else None

    def begin(self, write: Write, until: int, needed: int = 0) -> None:
        """Begin to train.

        Args:
            write: Writes this rank's files of the boundary that the framework is at; all ranks call theirs.
            until: Where training ends, in steps of the whole run.
            needed: The expected bytes of a checkpoint, for the choice of the local disk.
        """
        contents = self.contents
        contents.write, contents.needed = write, contents.needed or needed
        self._until, contents.config["max_steps"] = until, until
        if self.run.journal:
            self.run.journal.event("registered", loop=contents.framework, objects={})
        self._step_log = StepLog(self.run, until, contents.done)
        self._ends.begin_step()

    @property
    def _ends(self) -> StepEnd:
        assert self._step_end, "fetch() comes before the first step"
        return self._step_end

    def is_finished(self) -> bool:
        """True if the run has ended here, and its model is exported."""
        return is_finished(self.run, self.contents.done, self._until)

    # -- the steps -----------------------------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Keep metrics of the step that was counted last, or of the first one."""
        self._logged |= metrics

    def give(self, batch: object) -> None:
        """Take in a batch that the framework is about to train on."""
        self._trace.batch(batch)

    def start_step(self) -> None:
        """Publish the step before, and begin to agree with the other ranks, while the optimizer works."""
        self._publish()
        self._ends.start_to_agree()

    def begin_micro_step(self, left: int) -> None:
        """Begin a micro-step; as of `StepEnd.begin_micro_step`."""
        self._ends.begin_micro_step(left)

    def end_micro_step(self, left: int, is_kept: Callable[[], bool], go_back: Callable[[], None]) -> None:
        """End a micro-step that does not end its step: leave at a stop that leaves no time for the rest of the step.

        Args:
            left: Micro-steps of the step that follow this one.
            is_kept: Returns whether this rank can write the last boundary still.
            go_back: Has the framework write it, in place of the present state.

        Raises:
            Leaving: the micro-steps are dropped, and the last boundary is saved.
        """
        if stop := self._ends.end_micro_step(left, is_kept):
            go_back()
            self._closing.stop(stop)

    def end_step(self, lr: float | None = None, micro_steps: int = 1) -> None:
        """Count a step, and agree with the other ranks.

        Args:
            lr: The learning rate of the step.
            micro_steps: Those of a step.

        Raises:
            SaveError: the attempt cannot go on.
        """
        self._publish()
        is_first = self._ends.is_first
        _, seconds = self._ends.end(self.contents.done + 1, micro_steps)
        self._ends.choose(micro_steps)
        self._counted = self.contents.done, seconds, lr
        # Not the random streams: a framework may draw a batch ahead, or not.
        self._traced = {name: value for name, value in self._trace.step({}).items() if name == "batch"}
        if is_first:
            self.contents.forget_fetched()
        self._session.saver.check()

    @property
    def last_finite(self) -> str:
        """A sentence that names the newest checkpoint."""
        return self._session.saver.last_finite()

    @property
    def may_drop(self) -> bool:
        """A stop may end the next step before its end; the same on every rank."""
        return self._ends.looks

    @property
    def stops(self) -> bool:
        """All ranks have agreed to stop before the end of training."""
        return self._session.stop is not None and self.contents.done < (self._until or 0)

    @property
    def wants_save(self) -> bool:
        """This boundary is to be saved; the same on every rank."""
        return self.stops or (self._session.is_due() and self.contents.done > self._session.saved_at)

    def save(self) -> None:
        """Save this boundary; at a stop, leave after it.

        Raises:
            Leaving: it is time to stop.
        """
        self._publish()
        if self._session.stop and self.stops:
            self._closing.stop(self._session.stop)
        if self.contents.done > self._session.saved_at:
            self._session.save()

    def look(self, may_stop: Callable[[], bool] = lambda: True) -> None:
        """Agree with the other ranks outside of a step, and leave at a stop, with the boundary saved. All call it.

        Args:
            may_stop: Returns whether the boundary can be saved now, for all ranks.

        Raises:
            Leaving: it is time to stop.
        """
        session = self._session
        session.take_in(self._ends.agree())
        if session.stop and may_stop():
            self._closing.stop(session.stop)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        if self._counted and self._step_log:
            self._step_log.step(*self._counted, self._logged, self._traced, self._ends.timing)
            self._counted, self._logged = None, {}

    def _close(self) -> None:
        self._publish()
        if self._step_log:
            self._step_log.close()

    def finish(self, write: Callable[[Path], None] | None) -> None:
        """Save the last step, and export the model; as of `SpotRun.finish`.

        Raises:
            RunError: no step was done, or nothing tells what to export.
        """
        if self.is_finished():
            return
        write = write or self.export_files
        if not self.contents.done or write is None:
            raise RunError("finish(): no step was done, so there is nothing to export")
        self._publish()
        into = write
        self._export = lambda name: export.export(self.run, nn.Module(), lambda _, folder: into(folder), name)
        self._closing.finish(self._session.stop, resave=False)


def move_into(source: Path) -> Callable[[Path], None]:
    """A function that moves what is in a local folder into another one."""

    def move(folder: Path) -> None:
        for entry in list(source.iterdir()):
            shutil.move(entry, folder / entry.name)

    return move
