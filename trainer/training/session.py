"""Session: restores a run, saves it at boundaries, and ends its attempt; it has no idea of how a step is computed.

The program that trains changes the contents between two boundaries. It exchanges a row with all ranks in every step,
which begins with `message()`, and passes the answers to `take_in()`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from trainer.attempt.history import RECORDS_S
from trainer.bucket.deadlines import within
from trainer.checkpoint import extras, interval
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.reading import Memory, fresh
from trainer.checkpoint.restore import Found
from trainer.checkpoint.saving import SavePolicy, Saver
from trainer.checkpoint.state import RANDOM
from trainer.layout.names import CheckpointName
from trainer.ranks.agreement import Stop
from trainer.training import changes, restoring
from trainer.training.consensus import Consensus
from trainer.training.contents import Contents
from trainer.training.fit import Fit
from trainer.training.host import Host

LOOK_S = 0.2
"""How often to look whether the cloud leaves more time than a signal did."""
REPORTED_WAIT_S = 1.0
"""A longer wait for a save is reported."""


class Session:
    """One rank's part in saving a run and in stopping its attempt. Every rank calls the same methods in one order."""

    def __init__(
        self,
        host: Host,
        contents: Contents,
        policy: SavePolicy | None = None,
        save_every: int | None = None,
        grace_s: float = 0.0,
        memory: Memory = fresh,
    ) -> None:
        """Begin with nothing restored.

        Args:
            host: This process. On rank 0 its records have begun.
            contents: What is saved.
            policy: How many checkpoints to keep, and how many failures to tolerate.
            save_every: Steps between checkpoints; None: chosen from what saves and preemptions cost.
            grace_s: Seconds from SIGTERM to SIGKILL.
            memory: Returns the memory that each tensor of a checkpoint is read into.
        """
        self._host, self._contents, self._given = host, contents, save_every
        self._memory = memory
        self.saver = Saver(
            host.group, host.paths, host.attempt, host.journal, policy or SavePolicy(), host.print_line,
            host.stop_received,
        )  # fmt: skip
        host.trouble = lambda: self.saver.trouble
        host.last_committed = lambda: self.saver.committed_step
        self.interval = interval.Interval(save_every, interval.notice_seconds(grace_s), self._report_interval)
        self.consensus = Consensus(host, self.saver, self.interval)
        self.saved_at = 0
        """The step of the boundary that was last saved or restored."""
        self._has_reported_wait = False
        self._fit: Fit | None = None
        """What the last decision about the rest of a step was made from."""
        self._found, self._restore_s = Found(), 0.0
        if host.journal:
            # A save may be under way when the last one is due.
            host.journal.stop_takes_s = lambda: 2 * self.saver.save_s + grace_s

    # -- the beginning -------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Load the newest whole checkpoint into the contents, if there is one, and record it.

        Raises:
            StateError: the checkpoint does not fit the contents, or they cannot be saved.
            ReadError: there are checkpoints, and none can be read.
        """
        self.load()
        self.begin()

    def load(self) -> None:
        """Load the newest whole checkpoint into the contents; `begin` has to follow.

        If contents come in pieces, it may be called once more: everything is then loaded again.
        """
        started = time.monotonic()
        self._found = restoring.load_newest(self._host, self._contents, self._memory)
        self._restore_s = time.monotonic() - started

    def begin(self) -> None:
        """Take on from what was loaded, and record it."""
        host, contents, found = self._host, self._contents, self._found
        loaded = found.loaded
        changed = changes.changes(loaded.manifest.facts, self.facts()) if loaded else {}
        rejected = [parsed for one in found.rejected if (parsed := CheckpointName.parse(one["checkpoint"]))]
        is_finite = loaded.manifest.finite if loaded else True
        self.saver.adopt(str(host.attempt_name), loaded.name if loaded else None, is_finite, rejected)
        self.saved_at = contents.done
        host.steps_done, host.committed_step = contents.done, self.saver.committed_step
        contents.collect()  # Raises now, not at the first save, where a state cannot be saved.

        def records() -> None:
            restoring.report(host, contents, found, changed, self._restore_s)
            with within("reading the attempts' records", RECORDS_S):
                self.interval.learn(host.paths, host.attempt_name, contents.done)
            host.begin_tracking(contents.facts().get("config", {}))

        # Reading the records of earlier attempts takes a request each: other ranks wait on the store for that.
        host.group.rank0_does("restored", records, host.check_stop)
        self._found = Found()  # The tensors that were read take as much memory as the state.

    def prepare(self) -> None:
        """Get memory for copies, once the contents are as large as they get: after an attempt's first step.

        Raises:
            StateError: the ranks' contents differ in their tensors.
        """
        self.saver.prepare(extras.split(self._host.group, self._contents.collect())[0])
        self._host.hangs.begin()

    # -- stops ---------------------------------------------------------------------------------------------------------

    @property
    def stop(self) -> Stop | None:
        """The stop that all ranks have agreed on."""
        return self.consensus.stop

    def message(self, enough: bool = False) -> list[int]:
        """Return this rank's message, with which its row of an exchange begins; as of `Consensus.message`."""
        self._host.hangs.beat()
        return self.consensus.message(enough)

    def take_in(self, rows: Sequence[Sequence[int]], round_started: float | None = None, micro_steps: int = 1) -> None:
        """Draw the conclusions from all ranks' rows, as of `Consensus.take_in`."""
        self.consensus.take_in(rows, round_started, micro_steps)

    def leaves_time(self, rounds_left: int) -> bool:
        """True if the rest of a step and a save fit before the deadline of the agreed stop; the same on every rank.

        The decision is printed with its numbers, and again where a later micro-step changes it.
        """
        assert self.stop
        if not self.stop.ending.saves:
            return False
        before, self._fit = self._fit, self.consensus.fit(rounds_left)
        if before is None or before.fits != self._fit.fits:
            self._host.print_line(self._fit.line(self.stop.kind, self._contents.done + 1))
        return self._fit.fits

    # -- boundaries ----------------------------------------------------------------------------------------------------

    def is_due(self) -> bool:
        """True if this boundary is to be saved; the same on every rank."""
        if self.consensus.save_now and self._contents.done > self.saved_at:
            return True
        if self._given is not None:
            return self._contents.done % self._given == 0
        return self._contents.done - self.saved_at >= self.consensus.save_every

    def save(self, *, last: bool = False) -> None:
        """Start to save this boundary. Before the contents' steady tensors change, call `await_copied`.

        Raises:
            StateError: the contents cannot be saved.
            SaveError: the attempt cannot go on.
        """
        since, self.saved_at = self._contents.done - self.saved_at, self._contents.done
        self._host.hinted.clear()
        self._host.hangs.rest()  # A save has limits of its own, and waits for the one before.
        self.saver.start(lambda: self._boundary(last))
        if not last:
            self._host.hangs.begin()
        waited_s = self.saver.waited_s
        if waited_s > REPORTED_WAIT_S and not last and not self._has_reported_wait:
            self._has_reported_wait = True
            remedy = "save_every, or leave it out" if self._host.has_own_loop else "--save-every or use `auto`"
            self._host.print_line(
                f"Saving takes longer than the save interval ({since} steps); training stalled for {waited_s:.1f} s. "
                f"Raise {remedy}."
            )

    def save_last(self, stop: Stop | None, resave: bool = False) -> None:
        """Save this boundary and wait until the save is decided.

        Args:
            stop: The stop whose deadline ends the wait; None: no limit.
            resave: Save even a boundary that is committed already, because its state has changed since.
        """
        self._host.hangs.rest()
        self.saver.wait()
        if self._contents.done and (resave or self.saver.committed_step != self._contents.done):
            self.save(last=True)
            self.wait(stop)
        self._host.committed_step = self.saver.committed_step

    def wait(self, stop: Stop | None) -> None:
        """Wait until the save under way is decided, but no longer than a stop leaves time for."""
        if stop is None:
            self.saver.wait()
        while stop and not self.saver.idle and (left := self._host.deadline(stop) - time.monotonic()) > 0:
            self.saver.wait(min(left, LOOK_S))
        self.saver.check()

    def await_copied(self) -> None:
        """Wait until the contents' steady tensors may change."""
        self.saver.await_copied()

    def _boundary(self, last: bool) -> Boundary:
        """The contents of a checkpoint of this boundary."""
        host, contents = self._host, self._contents
        rank = host.group.rank
        state, own = extras.split(host.group, contents.collect())
        streams = contents.streams()
        if streams is not None:
            own = {f"{RANDOM}{rank}": streams, **own}
        if host.journal:
            host.journal.cut()
        return Boundary(
            step=contents.done,
            samples=contents.samples_done,
            state=state,
            own=own,
            plain=state.plain if rank == 0 else None,
            facts=self.facts() if rank == 0 else None,
            last=last,
            watched=contents.watched | {name for name in state.tensors if name.startswith("optim.")},
            spoilt_ends=contents.spoilt_ends,
            spoilt_remedy=contents.spoilt_remedy,
        )

    def facts(self) -> dict[str, Any]:
        """Return the manifest's facts: the run, the attempt, and what the contents say of themselves."""
        host, contents = self._host, self._contents
        return {
            "run_id": host.run_id,
            "step": contents.done,
            "samples": contents.samples_done,
            "world_size": host.group.world_size,
            "attempt": str(host.attempt_name),
            "binding": host.binding,
            **contents.facts(),
        }

    def take_in_costs(self, step_s: float, beside_a_save: bool) -> None:
        """Rank 0: take in the time of a step, and the cost of the last save once it is over."""
        saver = self.saver
        self.interval.stepped(step_s, beside_a_save or not saver.idle)
        if self.saved_at == saver.committed_step and saver.idle and saver.commit_s is not None:
            self.interval.saved(self.saved_at, saver.begun_s, saver.stall_s, saver.commit_s)

    def _report_interval(self, choice: interval.Choice, costs: interval.Costs) -> None:
        self._host.print_line(f"a checkpoint every {choice.steps} steps: {choice.why}")
        if self._host.journal:
            self._host.journal.event(
                "interval", steps=choice.steps, why=choice.why, step_s=costs.step_s, cost_s=costs.cost_s,
                commit_s=costs.commit_s,
            )  # fmt: skip
