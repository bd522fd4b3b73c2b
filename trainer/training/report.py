"""Report: publishes each step on rank 0, as a line of metrics, in progress.json and on the terminal."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from trainer.bucket.hashing import MASK
from trainer.ranks.agreement import Row
from trainer.training.participant import Participant
from trainer.training.progress import Progress, figures
from trainer.training.training_state import TrainingState
from trainer.training.waits import Waits


@dataclass(frozen=True)
class StepResult:
    """The figures of one step."""

    losses: list[float]
    """Loss sums, in the order of micro-steps."""
    rows: list[Row]
    """What the ranks' rows said of their micro-steps, in all rounds."""
    lr: float
    grad_norm: float
    total: float
    """The weight of its samples."""
    seconds: float
    waits: Waits


class Report:
    """Publishes the figures of each step; on other ranks than 0 it does nothing."""

    def __init__(self, run: Participant, state: TrainingState, restored_at: float) -> None:
        self._run, self._state = run, state
        self._progress = Progress(state.max_steps, state.done) if run.rank == 0 else None
        self._restored_at = restored_at
        """Monotonic seconds; 0 once the first step is recorded."""

    def step(self, result: StepResult, committed_step: int | None) -> None:
        """Publish a step that was just done."""
        run, state = self._run, self._state
        if run.attempt is None or run.journal is None or self._progress is None:
            return
        finite_losses = all(map(math.isfinite, result.losses))
        # Summed in the order of micro-steps, so that the result does not depend on which rank ran which.
        loss = finite_or_none(math.fsum(result.losses) / (result.total or 1)) if finite_losses else None
        order, seeds = sum(row.order for row in result.rows) & MASK, sum(row.rng for row in result.rows) & MASK
        skipped = {"skipped": state.watch.skipped} if state.watch.skipped else {}
        run.journal.line(
            {
                "step": state.done,
                "loss": loss,
                "lr": result.lr,
                "samples": state.samples_done,
                "order": f"{order:016x}",
                "rng": f"{seeds:016x}",
                "tokens": result.total,
                "grad_norm": finite_or_none(result.grad_norm),
                "step_s": round(result.seconds, 5),
                **result.waits.fields(),
                "world_size": run.group.world_size,
                **skipped,
            }
        )
        tokens_per_s, eta_s = self._progress.rates(state.done, result.total)
        run.journal.progress(
            {
                "step": state.done,
                "max_steps": state.max_steps,
                "loss": loss,
                "lr": result.lr,
                "tokens_per_s": round(tokens_per_s, 1),
                "committed_step": committed_step,
                "eta_s": round(eta_s, 1),
                **skipped,
            }
        )
        self._progress.step(state.done, figures(loss, result.lr, tokens_per_s), eta_s, committed_step)
        run.committed_step = committed_step
        if self._restored_at:
            record_first_step(run, self._restored_at)
            self._restored_at = 0.0

    def close(self) -> None:
        """Close the progress bar."""
        if self._progress:
            self._progress.close()


def record_first_step(run: Participant, restored_at: float) -> None:
    """Record that an attempt's first step is done; `restored_at` is when its state was restored (monotonic)."""
    if run.journal:
        now = time.monotonic()
        run.journal.event(
            "first-step",
            step=run.steps_done,
            seconds=round(now - run.launched_at, 3),
            after_restore_s=round(now - restored_at, 3),
        )


def finite_or_none(value: float) -> float | None:
    """The value; None for NaN and infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None
