"""Checkpointer: saves the training state at a boundary, and measures the cost of saves."""

from __future__ import annotations

import time
from typing import Any

import torch

from trainer.checkpoint import extras, interval
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.finite import watched
from trainer.checkpoint.saving import Saver
from trainer.checkpoint.state import RANDOM
from trainer.training import finite, rng
from trainer.training.participant import Participant
from trainer.training.training_state import TrainingState

REPORTED_WAIT_S = 1.0
"""A longer wait for a save is reported."""


class Checkpointer:
    """Collects the contents of a checkpoint, and passes them to the saver."""

    def __init__(
        self, run: Participant, state: TrainingState, saver: Saver, device: torch.device, tokens: str | None
    ) -> None:
        self._run, self._state, self.saver, self._device, self._tokens = run, state, saver, device, tokens
        self.saved_at = 0
        """The step of the boundary that was last saved or restored."""
        self.interval = interval.Interval(
            state.config.save_interval_steps, interval.notice_seconds(run.grace_s), self._report_interval
        )
        self._watched = watched(state.model)
        self._has_reported_wait = False

    def is_due(self, save_every: int) -> bool:
        """True if this boundary is to be saved; `save_every` is rank 0's choice, which all ranks have received."""
        state, given = self._state, self._state.config.save_interval_steps
        if given is not None:
            return state.done % given == 0
        return state.done - self.saved_at >= save_every

    def save(self, *, last: bool = False) -> None:
        """Start to save this boundary."""
        since, self.saved_at = self._state.done - self.saved_at, self._state.done
        self.saver.start(self._boundary(last))
        waited_s = self.saver.waited_s
        if waited_s > REPORTED_WAIT_S and not last and not self._has_reported_wait:
            self._has_reported_wait = True
            self._run.print_line(
                f"Saving takes longer than the save interval ({since} steps); training stalled for {waited_s:.1f} s. "
                "Raise --save-every or use `auto`."
            )

    def save_last(self, deadline: float | None, resave: bool = False) -> None:
        """Save this boundary and wait until the save is decided.

        Args:
            deadline: Where the wait ends, in monotonic seconds; None: no limit.
            resave: Save even a boundary that is committed already, because its state has changed since.
        """
        self.saver.wait()
        if self._state.done and (resave or self.saver.committed_step != self._state.done):
            self.save(last=True)
            self.saver.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        self._run.committed_step = self.saver.committed_step

    def _boundary(self, last: bool) -> Boundary:
        """The contents of a checkpoint of this boundary."""
        run, state = self._run, self._state
        whole, own = extras.split(run.group, state.collect(state.counters()))
        rank = run.group.rank
        facts = self.facts() if run.attempt else None
        if run.journal:
            run.journal.cut()
        return Boundary(
            step=state.done,
            samples=state.samples_done,
            state=whole,
            own={f"{RANDOM}{rank}": rng.save_streams(), **own},
            plain=whole.plain if rank == 0 else None,
            facts=facts,
            last=last,
            watched=self._watched | {name for name in whole.tensors if name.startswith("optim.")},
            spoilt_ends=state.config.on_nan != finite.IGNORE and not state.watch.row,
        )

    def facts(self) -> dict[str, Any]:
        """The facts of the manifest: the run, the attempt and its machine."""
        run, state = self._run, self._state
        device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        return {
            "run_id": run.run_id,
            "step": state.done,
            "samples": state.samples_done,
            "world_size": run.group.world_size,
            "attempt": str(run.attempt_name),
            "config": state.config.to_json(),
            "binding": run.binding,
            "machine": {
                "device": device,
                "instruction_set": torch.backends.cpu.get_cpu_capability(),
                "torch": torch.__version__,
                "threads": state.threads,
            },
            "tokens": self._tokens,
        }

    def take_in_costs(self, step_s: float, beside_a_save: bool) -> None:
        """Rank 0: take in the time of a step, and the cost of the last save once it is over."""
        saver = self.saver
        self.interval.stepped(step_s, beside_a_save or not saver.idle)
        if self.saved_at == saver.committed_step and saver.idle and saver.commit_s is not None:
            self.interval.saved(self.saved_at, saver.begun_s, saver.stall_s, saver.commit_s)

    def _report_interval(self, choice: interval.Choice, costs: interval.Costs) -> None:
        self._run.print_line(f"a checkpoint every {choice.steps} steps: {choice.why}")
        if self._run.journal:
            self._run.journal.event(
                "interval", steps=choice.steps, why=choice.why, step_s=costs.step_s, cost_s=costs.cost_s,
                commit_s=costs.commit_s,
            )  # fmt: skip
