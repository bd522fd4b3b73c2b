"""Computation: the arithmetic of a step. Passes over micro-steps, clipping, gathering the losses, the update."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trainer.checkpoint import forward_state
from trainer.errors import RunError
from trainer.ranks.agreement import from_bits, to_bits
from trainer.ranks.group import RankGroup
from trainer.ranks.messages import TOO_LARGE
from trainer.training import gradients, micro_batch, rng
from trainer.training.config import AUTO
from trainer.training.order import micro_steps, step_ids
from trainer.training.participant import Participant
from trainer.training.passes import Loss, Passes
from trainer.training.samples import MicroStep, Samples, to_device, weigh
from trainer.training.training_state import TrainingState


@dataclass(frozen=True)
class Gathered:
    """Losses and norms of a step, from all ranks."""

    losses: list[float]
    """Loss sums, in the order of micro-steps."""
    norms: list[float]
    """Norms of the gradients, by rank."""


def make_accelerator(run: Participant) -> Accelerator:
    """Wait for all ranks, form the process groups, and make accelerate's object."""
    config, group = run.config, run.group
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # The loop accumulates gradients itself; the variable would override the argument.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    on_gpu = torch.cuda.is_available() and not config.cpu
    run.await_all_ready()
    group.form_groups(on_gpu)
    if group.world_size == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)  # They would make accelerate open a port, even for one rank.
    # For fp16 we use torch's scaler: accelerate has none on the CPU.
    precision = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=precision, gradient_accumulation_steps=1)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.num_processes == group.world_size
    return accelerator


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model whose parameters have no shape yet.

    Raises:
        RunError: a parameter is uninitialized.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise RunError(f"{name} has no shape yet: run one batch through the model before train()")


class Computation:
    """The arithmetic of a step on this rank. Only `update` changes parameters and optimizer state."""

    def __init__(
        self,
        state: TrainingState,
        accelerator: Accelerator,
        group: RankGroup,
        loss: Loss,
        lr_factor: Callable[[int], float] | None,
        find_unused: bool | None,
    ) -> None:
        self._state, self._config = state, state.config
        self._group, self._loss, self._lr_factor = group, loss, lr_factor
        self.device = accelerator.device
        self._passes = Passes(state.model, loss, self.device, find_unused)
        self.ran_out = False
        """Memory has run out on this rank in the step under way."""
        self._samples: Samples | None = None
        self._lrs: list[Any] = []
        """The learning rates that the last step set, by group."""

    def join(self, samples: Samples, print_line: Callable[[str], None]) -> None:
        """Average gradients over the ranks from now on."""
        self._samples = samples
        if self._group.world_size > 1:
            with self._first_batch(samples) as batch, self._half():
                unused = self._passes.join(to_device(batch, self.device))
            if unused:
                print_line(_about_unused(unused))

    def throw_away_pass(self, samples: Samples) -> None:
        """Run one forward and backward pass before the restore, and drop the results.

        DistributedDataParallel regroups its buckets after the first backward pass. Without this pass that
        would be the first step after a resume, and its sums would run in another order than the undisturbed run's.
        """
        state = self._state
        with self._first_batch(samples) as batch:
            loss = self.forward(batch) / (weigh(samples, batch) or 1)
            _backward(state.scaler.scale(loss) if state.scaler else loss)
            state.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _first_batch(self, samples: Samples) -> Iterator[Any]:
        """The run's first micro-step, for passes that leave no trace in random streams, buffers and extra states."""
        config, state = self._config, self._state
        ids = step_ids(config.seed, len(samples), config.global_batch_size, 0)
        kept = forward_state.keep(state.model)
        try:
            with rng.seeded(rng.micro_step_seed(config.seed, 0, 0)):
                yield samples.batch(micro_steps(ids, state.micro_batch_size)[0])
        finally:
            forward_state.put_back(state.model, kept)

    def fits(self, samples: Samples) -> bool:
        """True if a pass over the run's first micro-step fits into this rank's memory; called before `join`.

        The room that the optimizer's state and the sums of the gradients will take is held meanwhile.
        """
        state = self._state
        trained = sum(one.numel() * one.element_size() for one in state.model.parameters() if one.requires_grad)
        copies = (0 if state.optimizer.state else 2) + (self._group.world_size > 1)
        fits = True
        try:
            room = torch.empty(copies * trained, dtype=torch.uint8, device=self.device)
            with self._first_batch(samples) as batch:
                _backward(self.forward(batch))
            del room
        except Exception as error:
            if not micro_batch.is_out_of_memory(error):
                raise
            fits = False
        self._free()
        return fits

    def _free(self) -> None:
        self._state.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forward_and_backward(self, micro: MicroStep, total: float, last: bool) -> torch.Tensor:
        """Run the passes of one micro-step; returns its loss sum.

        With a micro-batch of `auto`, `ran_out` is set where memory runs out: the step is to be done again.

        Args:
            micro: The micro-step.
            total: The weight of all samples of the step, on all ranks.
            last: Whether it is the last one of the step: its backward pass averages the gradients over the ranks.

        Raises:
            OutOfMemoryError: the other ranks cannot be told, because the sum of the gradients has begun.
        """
        try:
            return self._forward_and_backward(micro, total, last)
        except Exception as error:
            if self._config.micro_batch_size != AUTO or not micro_batch.is_out_of_memory(error):
                raise
        self.ran_out = True
        self._free()
        if last and self._group.world_size > 1:
            self._join_sum()
        return torch.zeros((), device=self.device)

    def _join_sum(self) -> None:
        """Take part in the sum of gradients that the other ranks wait for, with zeros and a batch of one sample."""
        assert self._samples
        state, config = self._state, self._config
        ids = step_ids(config.seed, len(self._samples), config.global_batch_size, state.done, state.offset)[:1]
        try:
            with rng.set_aside(), self._half():
                _backward(self._passes(to_device(self._samples.batch(ids), self.device)) * 0.0)
        except Exception as error:
            raise self._too_large("while the gradients were summed") from error

    def _too_large(self, when: str) -> micro_batch.OutOfMemoryError:
        """The error with which this attempt ends, where the step cannot be done again; the next one begins below."""
        group, size = self._group, self._state.micro_batch_size
        with suppress(Exception):  # Rank 0, which records it, may have left with its store.
            group.store.set(TOO_LARGE, str(size))
        return micro_batch.OutOfMemoryError(
            f"rank {group.rank}: out of memory with a micro-batch of {size}, {when}. The next attempt begins with half "
            "of it"
        )

    @contextmanager
    def _leaves_if_too_large(self) -> Iterator[None]:
        """A context for what follows the passes of a step: parts of the state may have changed already.

        Raises:
            OutOfMemoryError: memory ran out, with a micro-batch of `auto`.
        """
        try:
            yield
        except Exception as error:
            if self._config.micro_batch_size != AUTO or not micro_batch.is_out_of_memory(error):
                raise
            raise self._too_large("in the optimizer's step") from error

    def _forward_and_backward(self, micro: MicroStep, total: float, last: bool) -> torch.Tensor:
        model, scaler = self._state.model, self._state.scaler
        kept = None if micro.weight else forward_state.keep(model)
        wait = nullcontext() if last else self._passes.without_averaging()
        with wait:
            loss = self.forward(micro.batch)
            scaled = loss * (float(bool(micro.weight)) * self._group.world_size / (total or 1))
            _backward(scaler.scale(scaled) if scaler else scaled)
        if kept:
            forward_state.put_back(model, kept)
        return loss.detach()

    def forward(self, batch: Any, model: nn.Module | None = None) -> torch.Tensor:
        """The loss sum of a batch; on `model` alone if it is given."""
        batch = to_device(batch, self.device)
        with self._half():
            return self._passes(batch) if model is None else self._loss(model, batch)

    def _half(self) -> AbstractContextManager[Any]:
        if self._config.precision == "fp16":
            return torch.autocast(self.device.type, torch.float16)
        return nullcontext()

    def clip(self) -> tuple[float, bool]:
        """Clip the gradients; returns their norm before, and whether they overflowed because of fp16's loss scale."""
        scaler = self._state.scaler
        with self._leaves_if_too_large():
            if scaler:
                scaler.unscale_(self._state.optimizer)
            norm = float(gradients.clip(self._state.model, self._config.max_grad_norm))
        # At a scale of 1, values that are not finite have another cause.
        overflow = scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1
        return norm, overflow

    def gather(self, losses: list[torch.Tensor], norm: float) -> Gathered:
        """Gather the losses of all micro-steps, and the norms of the gradients of all ranks."""
        mine = torch.stack(losses).double().tolist()
        rows = self._group.exchange([to_bits(value) for value in (*mine, norm)]).wait()
        # The last micro-steps of some ranks may have had no samples of their own.
        count = -(-self._config.global_batch_size // self._state.micro_batch_size)
        ordered = [from_bits(row[number]) for number in range(len(mine)) for row in rows]
        return Gathered(ordered[:count], [from_bits(row[-1]) for row in rows])

    def update(self, step: int, dropped: bool, await_copied: Callable[[], None]) -> float:
        """Set the learning rate for the global step, and run the optimizer unless the step is dropped.

        Args:
            step: The global step, from 0.
            dropped: Whether to drop the update, because losses or gradients are not finite.
            await_copied: Returns once the save under way has copied the parameters and the optimizer's state.

        Returns:
            The learning rate of the first parameter group.
        """
        state = self._state
        await_copied()
        self._set_lr(step)
        lr = float(state.optimizer.param_groups[0]["lr"])
        with self._leaves_if_too_large():
            if dropped:
                state.put_back_boundary()
            elif state.scaler:
                state.scaler.step(state.optimizer)  # One that the scaler skips because of an overflow counts too.
            else:
                state.optimizer.step()
        if state.scaler:
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        return lr

    def _set_lr(self, step: int) -> None:
        """Set each group's learning rate, if `lr_factor` says it.

        Raises:
            RunError: something else has changed it since the last step.
        """
        if self._lr_factor is None:
            return
        factor, groups = self._lr_factor(step + 1), self._state.optimizer.param_groups
        now = [group["lr"] for group in groups]
        if self._lrs and now != self._lrs:
            raise RunError(
                f"step {step + 1}: lr_factor had set a learning rate of {self._lrs[0]:g}, and it is {now[0]:g} now: a "
                "scheduler changes it too. Leave lr_factor out to use the scheduler's, and put it into train(extra=...)"
            )
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        self._lrs = [group["lr"] for group in groups]


def _about_unused(names: list[str]) -> str:
    several = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
    return (
        f"{several} got no gradient from the first batch. So the processes look for such parameters in every step, as "
        "with train(..., find_unused_parameters=True)"
    )


def _backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
