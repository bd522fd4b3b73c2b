"""Stepping: the boundaries of a user's loop. Each batch that the loop asks for ends what it did with the one before."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from trainer.bucket.hashing import MASK
from trainer.errors import RunError
from trainer.machine.loader_workers import died_at_stop
from trainer.ranks.agreement import MESSAGE_INTS
from trainer.training import accelerate_state, same_batches, unsaved
from trainer.training.arguments import batches_of_a_step, refuse_unlike_accelerate
from trainer.training.closing import Closing
from trainer.training.data_place import DataPlace
from trainer.training.feed import Feed, sampler_of
from trainer.training.kept import Kept, keep
from trainer.training.participant import Participant
from trainer.training.phases import Phases
from trainer.training.registered import Registered
from trainer.training.replicas import refuse_diverged
from trainer.training.session import Session
from trainer.training.step_end import StepEnd
from trainer.training.step_log import StepLog
from trainer.training.step_trace import StepTrace
from trainer.training.unregistered import Watch


class Stepping:
    """Counts the steps of a user's loop, saves at its boundaries, and ends it at a stop."""

    def __init__(self, run: Participant, contents: Registered, session: Session, closing: Closing) -> None:
        self._run, self._contents, self._session, self._closing = run, contents, session, closing
        self.accumulate = 1
        """The number of batches of a step; with accelerate, which counts them itself, 1."""
        self._number = 0
        """Batches that this attempt has made."""
        self._begun = 0
        """Those of them that belong to steps which are done."""
        self._feed: Feed | None = None
        self._until = 0
        self._logged: dict[str, Any] = {}
        self._lr: float | None = None
        self._has_stepped = False
        """An optimizer has stepped since the last boundary."""
        self._kept: Kept | None = None
        """The last boundary, if a stop may end this step before its end."""
        self._ends = StepEnd(run, contents, session, self._message)
        self._phases = Phases(contents)
        self._before: unsaved.Attributes = {}
        self._step_log: StepLog | None = None
        self._trace = StepTrace()
        self._first_batch: int | None = None
        """A hash of the attempt's first batch, for a comparison of the ranks."""
        self._is_open = False
        """A call of `steps` has yielded a batch, and its loop has not ended."""
        self._watch = Watch(contents, session.await_copied, run.print_line, lambda: run._exit is not None)
        for number, optimizer in enumerate(contents.optimizers.values()):
            optimizer.register_step_pre_hook(self._before_step if not number else self._await_copied)
            optimizer.register_step_post_hook(self._after_step)

    def log(self, values: dict[str, Any]) -> None:
        """Keep metrics of the step that the loop is in; later values of a name replace earlier ones."""
        self._logged |= values

    def steps(self, loader: Iterable[Any], until: int, accumulate: int | None) -> Iterator[Any]:
        """Yield batches, until so many steps are done in the whole run; a boundary lies between two steps.

        Args:
            loader: Makes the batches of an epoch each time it is iterated over.
            until: Where training ends.
            accumulate: The number of batches of a step; None: as the loader's sampler says, or 1.

        Raises:
            RunError: the loader does not fit.
            Leaving: it is time to stop, and the last boundary is saved.
        """
        if self._is_open:
            raise RunError(
                "steps(): the loop over an earlier run.steps() has not ended, and both would count steps. Combine two "
                "data sets in one loader (torch.utils.data.StackDataset), or iterate over the second loader by itself"
            )
        has_steps = self._phases.begin(loader, until)
        self._bind(loader)
        if not has_steps:
            return
        self._is_open = True
        try:
            yield from self._batches(loader, until, accumulate)
        finally:
            self._is_open = False

    def _batches(self, loader: Iterable[Any], until: int, accumulate: int | None) -> Iterator[Any]:
        """Yield the batches of a call of `steps` that has something to do."""
        contents, run = self._contents, self._run
        feed, batches = self._phases.open(lambda: Feed(loader, contents, run.world_size, run.print_line))
        self._feed = feed
        accumulate = batches_of_a_step(feed.sampler, accumulate)
        refuse_unlike_accelerate(loader, accumulate, run.world_size)
        if self._session.stop:  # It came in the last step of the call before.
            self._closing.stop(self._session.stop)
        self.accumulate, self._begun = accumulate, 0
        self.begin(until)
        asked = self._asked(feed, batches)
        for self._number, batch in enumerate(asked, start=1):
            self.give(batch)
            self.begin_micro_step(self._left)
            try:
                yield batch
            except GeneratorExit:  # The loop was left by `break`, perhaps after a step.
                self._ends.forget()
                if self._has_stepped:
                    seconds = self._ends.count(contents.done + 1, time.monotonic())
                    self._publish(seconds, [feed.order] if run.world_size == 1 else [])
                raise
            if self.ends_step:
                self.boundary()
                if contents.done >= until:
                    return
            else:
                self.end_micro_step(self._left)

    def _asked(self, feed: Feed, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches of the feed; where a loader's worker has died at a stop, stop at the last boundary."""
        while True:
            place, asked = copy.copy(self._contents.data), time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                # This process could not load the batch either. Other ranks may have gone on: they have got theirs.
                if self._run.world_size == 1 and died_at_stop(error, self._run.stop_received):
                    self._stop_without_batch(feed, place)
                raise
            self._ends.data_s = (self._ends.data_s or 0.0) + time.monotonic() - asked
            yield batch

    def _stop_without_batch(self, feed: Feed, place: DataPlace) -> None:
        """Leave at the stop that was heard, with the last boundary saved; returns if that is not there any more."""
        session = self._session
        self._ends.forget()  # Its row was made before the stop was heard.
        session.take_in(self._ends.agree())
        if session.stop:
            if self._can_go_back(feed, place):
                self._closing.stop(session.stop)
            session.wait(session.stop)  # For the save under way.

    def _can_go_back(self, feed: Feed, place: DataPlace) -> bool:
        """Be at the last boundary, as no batch follows it; False if that cannot be done."""
        if self._number == self._begun:
            return feed.go_back(place)
        self._contents.last_boundary = self._kept
        return self._is_kept()

    def _bind(self, loader: Iterable[Any]) -> None:
        """Bind the run to the order of a sampler of ours, under other names for each further loader of the run."""
        run, number = self._run, self._phases.number
        sampler = sampler_of(loader)
        if sampler is None or number != self._contents.data.loader:  # An earlier loader's, whose steps are done.
            return
        order = {"n_samples": sampler.n_samples, "global_batch_size": sampler.global_batch_size, "seed": sampler.seed}
        bound = {f"{name}_{number + 1}" if number else name: value for name, value in order.items()}
        if not bound.items() <= run.binding.items():
            run.group.rank0_does("bind-sampler", lambda: run.bind(**bound), run.check_stop)

    @property
    def ends_step(self) -> bool:
        """The batch that the loop has now is the last one of its step; with accelerate, inside of `accumulate()`."""
        return self._number > 0 and self._number % self.accumulate == 0 and accelerate_state.ends_step()

    @property
    def _micro_steps(self) -> int:
        """The number of batches of a step."""
        return self.accumulate * accelerate_state.accumulates()

    @property
    def _left(self) -> int:
        """Batches of the step that follow the one that the loop has now; accelerate may end a step before."""
        return max(0, self._micro_steps - self.index - 1)

    @property
    def index(self) -> int:
        """The number in its step, from 0, of the batch that the loop has now."""
        return self._number - self._begun - 1

    def begin(self, until: int) -> None:
        """Prepare for the first step of the attempt, or of a call; training ends at step `until` (0: unknown)."""
        contents = self._contents
        self._until = until
        if self._step_log:
            self._step_log.close()
        self._step_log = StepLog(self._run, until, contents.done)
        if self._ends.is_first:
            self._before = unsaved.attributes(contents.models, contents.others)
        self._ends.begin_step()
        self._ends.choose(self._micro_steps)

    def give(self, batch: object) -> None:
        """Take in a batch that the loop is about to get."""
        self._run.hangs.beat()
        self._trace.batch(batch)
        if self._first_batch is None:
            self._first_batch = same_batches.hash_of(batch) if self._run.world_size > 1 else 0

    def close(self) -> None:
        """Close the progress bar, and let go of the loader."""
        self._phases.close()
        self._watch.close()
        if self._step_log:
            self._step_log.close()

    def _publish(self, seconds: float, orders: list[int]) -> None:
        """Publish the step that was counted, with its time and the fingerprint of its samples."""
        self._has_stepped, self._begun = False, self._number
        order = {"order": f"{sum(orders) & MASK:016x}"} if any(orders) else {}
        if self._step_log:
            traced = self._trace.step(self._contents.optimizers)
            logged = {**order, **self._logged}
            self._step_log.step(self._contents.done, seconds, self._lr, logged, traced, self._ends.timing)
        self._logged = {}

    def boundary(self, done: int | None = None, is_last: bool | None = None) -> None:
        """End a step: agree with the other ranks, save if it is time, leave at a stop.

        Args:
            done: Steps done in the whole run now; None: one more.
            is_last: Whether training has ended; None: if it is the step at which it is to end.

        Raises:
            Leaving: it is time to stop, and this boundary is saved.
        """
        contents, session, is_first = self._contents, self._session, self._ends.is_first
        micro_steps = self._number - self._begun or self.accumulate
        rows, seconds = self._ends.end(contents.done + 1 if done is None else done, micro_steps)
        self._publish(seconds, [row[MESSAGE_INTS] for row in rows])
        if is_first:
            self._after_first_step()
        going_on = contents.done < self._until if is_last is None else not is_last
        if session.stop and going_on:
            self._closing.stop(session.stop)
        if not going_on or session.is_due():
            refuse_diverged(self._run.group, contents.models, contents.done, sample=True)
            session.save()
            if not going_on or contents.may_swap:  # What follows may be an evaluation with other weights.
                session.await_copied()
        session.saver.check()
        looks = self._ends.choose(self._micro_steps) and going_on
        self._kept = keep(contents.collect(), contents.streams()) if looks else None

    # -- within a step -------------------------------------------------------------------------------------------------

    def begin_micro_step(self, left: int) -> None:
        """Begin a micro-step; as of `StepEnd.begin_micro_step`."""
        self._ends.begin_micro_step(left)

    def end_micro_step(self, left: int) -> None:
        """End a micro-step that does not end its step: leave at a stop that leaves no time for the rest of the step.

        Args:
            left: Micro-steps of the step that follow this one.

        Raises:
            Leaving: the micro-steps are dropped, and the last boundary is saved.
        """
        if stop := self._ends.end_micro_step(left, self._is_kept):
            self._contents.last_boundary = self._kept
            self._closing.stop(stop)

    def _is_kept(self) -> bool:
        return self._kept is not None and not self._has_stepped and self._kept.is_whole

    # -- evaluations ---------------------------------------------------------------------------------------------------

    def look(self, done: int, go_back: Callable[[], bool]) -> None:
        """Agree with the other ranks in an evaluation between two steps, and leave at a stop. All ranks call it.

        Args:
            done: Steps done in the whole run now.
            go_back: Has the contents be what they were before the evaluation; returns whether they are, for all ranks.

        Raises:
            Leaving: it is time to stop, and the step before the evaluation is saved.
        """
        session = self._session
        session.take_in(self._ends.agree())
        if session.stop and go_back():
            if done != self._contents.done:
                self.boundary(done, is_last=False)
            self._closing.stop(session.stop)

    def _after_first_step(self) -> None:
        """Name what steps change and no checkpoint holds, and get memory for copies."""
        contents, run = self._contents, self._run
        self._watch.end_first_step()
        are_same = same_batches.are_same(run.group, self._first_batch or 0)
        unsaved.report(run, contents, self._before, are_same)
        if are_same:
            run.print_line(same_batches.line(run.world_size))
        self._before = {}
        refuse_diverged(run.group, contents.models, contents.done, sample=False)
        self._session.prepare()

    def _message(self) -> list[int]:
        """This rank's row: its message on stopping, and the fingerprint of its samples in the step."""
        return [*self._session.message(), self._feed.order if self._feed else 0]

    # -- hooks of the optimizers ---------------------------------------------------------------------------------------

    def _await_copied(self, *_: Any) -> None:
        self._session.await_copied()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._session.await_copied()
        if self.ends_step:
            self._ends.start_to_agree()
        lr = optimizer.param_groups[0].get("lr")
        self._lr = None if lr is None else float(lr)

    def _after_step(self, *_: Any) -> None:
        self._has_stepped = True
