"""Evaluation: computes the mean loss over the held-out samples, every `eval_interval_steps`."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import nn

from trainer.bucket.hashing import fingerprint
from trainer.checkpoint import buffers, forward_state
from trainer.checkpoint.names import unwrap
from trainer.checkpoint.state import StateError
from trainer.ranks.agreement import exact_sum, from_bits, to_bits
from trainer.ranks.group import RankGroup
from trainer.training import rng
from trainer.training.computation import Computation
from trainer.training.order import micro_steps
from trainer.training.participant import Participant
from trainer.training.report import finite_or_none
from trainer.training.samples import Samples, weigh
from trainer.training.session import Session
from trainer.training.training_state import TrainingState


class Evaluation:
    """Evaluates the model on the held-out samples; each rank takes its part of them."""

    def __init__(
        self,
        run: Participant,
        state: TrainingState,
        computation: Computation,
        session: Session,
        held_out: Samples | None,
    ) -> None:
        self._run, self._state, self._computation, self._session = run, state, computation, session
        self._held_out = held_out

    def run_if_due(self) -> bool:
        """Evaluate if this boundary is due and not evaluated yet; returns whether it was evaluated."""
        state, every = self._state, self._state.config.eval_interval_steps
        if not self._held_out or not every or not state.done or state.done % every or state.evaluated >= state.done:
            return False
        started = time.monotonic()
        loss = self._mean_loss(self._held_out)
        if loss is None:
            return False
        state.evaluated = state.done
        if self._run.journal:
            self._run.journal.line(
                {"step": state.done, "eval_loss": finite_or_none(loss), "eval_s": round(time.monotonic() - started, 4)}
            )
            self._run.print_line(f"step {state.done}  held-out loss {loss:.4f}")
        return True

    def _mean_loss(self, held_out: Samples) -> float | None:
        """The mean loss over the held-out samples; None where a stop was agreed on meanwhile and steps remain."""
        state, group, session = self._state, self._run.group, self._session
        parts = micro_steps(np.arange(len(held_out)), state.micro_batch_size)
        model, ranks = unwrap(state.model), group.world_size
        losses, weights = [], []
        modes = {module: module.training for module in model.modules()}
        # The ranks saw different samples, so their buffers differ: all use rank 0's, as a checkpoint does.
        own = forward_state.keep(model)
        refuse_unlike_buffers(group, model)
        group.broadcast(tensor for _, tensor in model.named_buffers())
        model.eval()
        try:
            with rng.set_aside(), torch.no_grad():
                for first in range(0, len(parts), ranks):
                    exchange = group.exchange(session.message())
                    index = first + group.rank
                    if index < len(parts):
                        batch = held_out.batch(parts[index])
                        losses.append(float(self._computation.forward(batch, model)))
                        weights.append(weigh(held_out, batch))
                    session.take_in(exchange.wait())
                    if session.stop and state.done < state.max_steps:
                        return None
        finally:
            forward_state.put_back(model, own)
            for module, training in modes.items():  # Not model.train(): some may be frozen in eval mode.
                module.training = training
        weights += [0.0] * (-(-len(parts) // ranks) - len(weights))
        rows = group.exchange([to_bits(value) for value in (math.fsum(losses), *weights)]).wait()
        total = exact_sum(from_bits(bits) for row in rows for bits in row[1:])
        return math.fsum(from_bits(row[0]) for row in rows) / (total or 1)


def refuse_unlike_buffers(group: RankGroup, model: nn.Module) -> None:
    """Check that the ranks' buffers have the same names and shapes; otherwise a broadcast would hang or mix them up.

    Raises:
        StateError: they do not.
    """
    own = [f"{name}{buffers.form(tensor)}" for name, tensor in model.named_buffers()]
    rows = group.exchange([fingerprint(*own)]).wait()
    if any(row != rows[0] for row in rows):
        raise StateError("the ranks' buffers differ in names or shapes: those of rank 0 cannot be sent to the others")
