"""StepLog: publishes the steps of a user's loop on rank 0: in the metrics, progress.json and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from trainer.errors import RunError
from trainer.training.participant import Participant
from trainer.training.progress import Progress, figures
from trainer.training.report import finite_or_none


class StepLog:
    """Publishes each step; on other ranks than 0 it does nothing."""

    def __init__(self, run: Participant, until: int, done: int) -> None:
        """Begin to show the progress.

        Args:
            run: This process.
            until: Where training ends, in steps; 0: unknown.
            done: Steps done so far.
        """
        self._run, self._until = run, until
        self._progress = Progress(until, done) if run.rank == 0 else None

    def step(
        self,
        done: int,
        seconds: float,
        lr: float | None,
        logged: Mapping[str, Any],
        traced: Mapping[str, Any] = MappingProxyType({}),
        timing: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Publish a step that was done.

        Args:
            done: Steps done in the whole run.
            seconds: Its time.
            lr: Its learning rate, where that is known.
            logged: Its metrics: numbers, 0-d tensors or text.
            traced: What a rehearsal compares of it besides (`StepTrace.step`).
            timing: When it ended, and its waits (`StepEnd.timing`).

        Raises:
            RunError: a metric is something else.
        """
        run, progress = self._run, self._progress
        if run.journal is None or progress is None:
            return
        metrics = {name: plain(value) for name, value in logged.items() if name != "step"}  # The run counts its steps.
        loss = metrics.get("loss")
        rate = {} if lr is None else {"lr": lr}
        fields = {"world_size": run.world_size, "step_s": round(seconds, 5), **timing, **metrics, **traced}
        run.journal.line({"step": done, **rate, **fields})
        eta_s = max(0.0, progress.rates(done, 0.0)[1])
        place = {"step": done, "max_steps": self._until or None, "committed_step": run.committed_step}
        run.journal.progress({**place, "loss": loss, **rate, "eta_s": round(eta_s, 1)})
        shown = figures(loss, lr) if "loss" in metrics else f"lr {lr:.2e}" if lr else ""
        progress.step(done, shown, eta_s, run.committed_step)

    def close(self) -> None:
        """Close the progress bar."""
        if self._progress:
            self._progress.close()


def plain(value: Any) -> Any:
    """A metric as JSON holds it: a number, or None if it is not finite; text as it is.

    Raises:
        RunError: it is something else.
    """
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach()
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RunError(f"run.log: {value!r:.60} is neither a number nor text") from None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return finite_or_none(number)
