"""Computation: how a step is computed. Passes over micro-steps, the gradients' norm, all ranks' losses, the update."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trainer.checkpoint import buffers
from trainer.errors import RunError
from trainer.ranks.agreement import from_bits, to_bits
from trainer.ranks.group import RankGroup
from trainer.training import gradients, rng
from trainer.training.order import micro_steps, step_ids
from trainer.training.participant import Participant
from trainer.training.samples import MicroStep, Samples, to_device, weigh
from trainer.training.training_state import TrainingState

Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class Gathered:
    """What a step gave on all ranks."""

    losses: list[float]
    """Sums, in the order of micro-steps."""
    norms: list[float]
    """Of the gradients, by rank."""


def make_accelerator(run: Participant) -> Accelerator:
    """The accelerator of this attempt, once all ranks are there and have formed their groups."""
    config, group = run.config, run.group
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # Accumulation is this loop's own; the variable would override the argument.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    on_gpu = torch.cuda.is_available() and not config.cpu
    run.await_all_ready()
    group.form_groups(on_gpu)
    if group.world_size == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # Alone, accelerate would take them as a reason to open a port.
    # fp16 brings torch's own scaler instead: accelerate has none on the CPU.
    precision = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=precision, gradient_accumulation_steps=1)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.num_processes == group.world_size
    return accelerator


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model with parameters that have no shape yet.

    Raises:
        RunError: it has such parameters.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise RunError(f"{name} has no shape yet: run one batch through the model before train()")


class Computation:
    """A step's arithmetic on this rank; it changes the training's state in `update` alone."""

    def __init__(
        self,
        state: TrainingState,
        accelerator: Accelerator,
        group: RankGroup,
        loss: Loss,
        lr_factor: Callable[[int], float],
    ) -> None:
        self._state, self._config = state, state.config
        self._accelerator, self._group, self._loss, self._lr_factor = accelerator, group, loss, lr_factor
        self.device = accelerator.device

    def throw_away_pass(self, samples: Samples) -> None:
        """One forward and backward whose results are dropped, before anything is restored.

        DistributedDataParallel regroups its buckets after the first backward pass it sees. Without this pass that
        would be the first step after a resume, whose sums would then run in another order than the undisturbed run's.
        """
        config, state = self._config, self._state
        ids = micro_steps(
            step_ids(config.seed, len(samples), config.global_batch_size, 0), config.micro_batch_size
        )[0]  # fmt: skip
        kept = buffers.keep(state.model)
        with rng.seeded(rng.micro_step_seed(config.seed, 0, 0)):
            batch = samples.batch(ids)
            loss = self.forward(batch) / (weigh(samples, batch) or 1)
            (state.scaler.scale(loss) if state.scaler else loss).backward()
        state.optimizer.zero_grad(set_to_none=True)
        buffers.put_back(state.model, kept)

    def forward_and_backward(self, micro: MicroStep, total: float, last: bool) -> torch.Tensor:
        """The passes of one micro-step, under its generators; its loss sum.

        Args:
            micro: The micro-step.
            total: What the whole step's samples weigh, on all ranks.
            last: Whether it is the step's last one: the gradients are then averaged over the ranks.
        """
        model, scaler = self._state.model, self._state.scaler
        kept = {} if micro.weight else buffers.keep(model)
        wait = nullcontext() if last else self._accelerator.no_sync(model)
        with wait:
            loss = self.forward(micro.batch)
            scaled = loss * (float(bool(micro.weight)) * self._group.world_size / (total or 1))
            (scaler.scale(scaled) if scaler else scaled).backward()
        buffers.put_back(model, kept)
        return loss.detach()

    def forward(self, batch: Any, model: nn.Module | None = None) -> torch.Tensor:
        """The loss sum of a batch, by the training's model or another one."""
        half: AbstractContextManager[Any] = nullcontext()
        if self._config.precision == "fp16":
            half = torch.autocast(self.device.type, torch.float16)
        with half:
            return self._loss(model or self._state.model, to_device(batch, self.device))

    def clip(self) -> tuple[float, bool]:
        """Clip the gradients; (their norm before, whether the loss scale of half precision was too high for them)."""
        scaler = self._state.scaler
        if scaler:
            scaler.unscale_(self._state.optimizer)
        norm = float(gradients.clip(self._state.model, self._config.max_grad_norm))
        # A scale that was lowered to 1 and is too high still is none: what is not finite comes from elsewhere.
        overflow = scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1
        return norm, overflow

    def gather(self, losses: list[torch.Tensor], norm: float) -> Gathered:
        """The losses of all ranks' micro-steps, and the norms of their gradients."""
        mine = torch.stack(losses).double().tolist()
        rows = self._group.exchange([to_bits(value) for value in (*mine, norm)]).wait()
        # Some ranks' last micro-steps may only have kept the others company.
        count = -(-self._config.global_batch_size // self._config.micro_batch_size)
        ordered = [from_bits(row[number]) for number in range(len(mine)) for row in rows]
        return Gathered(ordered[:count], [from_bits(row[-1]) for row in rows])

    def update(self, step: int, dropped: bool, await_copied: Callable[[], None]) -> float:
        """Set the learning rate from the global step, and let the optimizer step unless it is dropped; the LR.

        `await_copied` returns once the save under way has copied the parameters and the optimizer's state.
        """
        state = self._state
        factor = self._lr_factor(step + 1)
        await_copied()
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if dropped:
            state.put_back_buffers()
        elif state.scaler:
            state.scaler.step(state.optimizer)  # A step that the scaler skips for an overflow counts as a step.
        else:
            state.optimizer.step()
        if state.scaler:
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return float(state.optimizer.param_groups[0]["lr"])
