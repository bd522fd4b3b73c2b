"""TrainingState: everything that steps change. A checkpoint holds it, and a resume restores it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import buffers, forward_state
from trainer.checkpoint.state import State, StateError, apply, collect, options_of
from trainer.training import finite
from trainer.training.config import RunConfig


class TrainingState:
    """The model, the optimizer, the scaler, the user's extra objects, and the progress of training."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        extra: Mapping[str, Any],
        made: buffers.Forms,
    ) -> None:
        """Begin at step 0.

        Args:
            config: The run's.
            model: The model that accelerate has prepared.
            optimizer: Over the model's parameters, with the options that the program gave it.
            scaler: Scales the losses of fp16; None for other precisions.
            extra: Objects with `state_dict` and `load_state_dict`, by name.
            made: The forms of the model's buffers when the program made them.
        """
        self.config, self.model, self.optimizer, self.scaler, self.extra = config, model, optimizer, scaler, dict(extra)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._begun, self._made = copy.deepcopy(options_of(optimizer)), made
        self.done = 0
        """Steps done."""
        self.offset = 0
        """Samples consumed beyond done * global batch size; not 0 only after the global batch size changed."""
        self.evaluated = 0
        """The step of the newest evaluation."""
        self.watch = finite.Watch(config.on_nan)
        self.threads = torch.get_num_threads()
        self.kept = forward_state.Kept({}, {})
        """The buffers and the modules' extra state at the last boundary."""

    @property
    def samples_done(self) -> int:
        """The number of samples that the run has consumed."""
        return self.done * self.config.global_batch_size + self.offset

    def counters(self) -> dict[str, Any]:
        """The values of this loop that a checkpoint holds."""
        return {
            "step": self.done,
            "evaluated": self.evaluated,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "watch": self.watch.state_dict(),
        }

    def collect(self, counters: Mapping[str, Any]) -> State:
        """The live tensors and values, in the form that a checkpoint holds."""
        extra = {name: thing.state_dict() for name, thing in self.extra.items()}
        return collect(self.model, [self.optimizer], counters, extra, [self._begun], self._made)

    def load(self, tensors: Mapping[str, Any], plain: Mapping[str, Any], checkpoint_name: str) -> Mapping[str, Any]:
        """Load a checkpoint into the model, the optimizer, the extra objects and the scaler; returns its counters.

        Raises:
            StateError: the checkpoint does not fit them.
        """
        counters, extra = apply(self.model, [self.optimizer], tensors, plain, [self._begun], self._made)
        self._load_extra(extra, checkpoint_name)
        if self.scaler and counters.get("scaler"):
            self.scaler.load_state_dict(counters["scaler"])
        return counters

    def _load_extra(self, saved: Mapping[str, Any], checkpoint_name: str) -> None:
        """Load the extra objects.

        Raises:
            StateError: the names of the registered objects are not those in the checkpoint.
        """
        for name in sorted(saved.keys() ^ self.extra.keys()):
            raise StateError(
                f"extra {name!r} is registered, but checkpoint {checkpoint_name} does not have it. Remove it, or start "
                "a new run"
                if name in self.extra
                else f"checkpoint {checkpoint_name} has extra {name!r}, which is not registered and would be "
                "lost. Register it again, or start a new run"
            )
        for name, thing in self.extra.items():
            thing.load_state_dict(saved[name])

    def keep_boundary(self) -> None:
        """Keep the buffers and the modules' extra state of this boundary."""
        self.kept = forward_state.keep(self.model)

    def put_back_boundary(self) -> None:
        """Put back those of the last boundary."""
        forward_state.put_back(self.model, self.kept)
