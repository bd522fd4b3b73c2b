"""TrainingState: everything that steps change. A checkpoint holds it, and a resume restores it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import buffers, forward_state
from trainer.checkpoint.finite import watched
from trainer.checkpoint.frozen import Frozen
from trainer.checkpoint.state import State, StateError, apply, collect, options_of
from trainer.errors import RunError
from trainer.training import finite, micro_batch, rng
from trainer.training.changes import machine_facts
from trainer.training.config import RunConfig
from trainer.training.contents import Restored

MAX_THREADS = 1024


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
        max_steps: int,
        device: torch.device,
        tokens: str | None,
    ) -> None:
        """Begin at step 0.

        Args:
            config: The run's.
            model: The model that accelerate has prepared.
            optimizer: Over the model's parameters, with the options that the program gave it.
            scaler: Scales the losses of fp16; None for other precisions.
            extra: Objects with `state_dict` and `load_state_dict`, by name.
            made: The forms of the model's buffers when the program made them.
            max_steps: Where training ends.
            device: The model's.
            tokens: The folder of prepared data, for the manifests.
        """
        self.config, self.model, self.optimizer, self.scaler, self.extra = config, model, optimizer, scaler, dict(extra)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.max_steps, self._device, self._tokens = max_steps, device, tokens
        self._begun, self._made = copy.deepcopy(options_of(optimizer)), made
        self.base = Frozen(model)
        """What checkpoints leave out of it."""
        self.watched = watched(model)
        """The trained parameters: a checkpoint in which one is not finite does not count."""
        self.done = 0
        """Steps done."""
        self.micro_batch_size = micro_batch.given(config.micro_batch_size) or 1
        """Samples of a micro-step."""
        self.offset = 0
        """Samples consumed beyond done * global batch size; not 0 only after the global batch size changed."""
        self.evaluated = 0
        """The step of the newest evaluation."""
        self.enough = False
        """The program has ended training early: with the last step done."""
        self.watch = finite.Watch(config.on_nan)
        self.threads = torch.get_num_threads()
        self.kept = forward_state.Kept({}, {})
        """The buffers and the modules' extra state at the last boundary."""

    @property
    def samples_done(self) -> int:
        """The number of samples that the run has consumed."""
        return self.done * self.config.global_batch_size + self.offset

    @property
    def position(self) -> str:
        """Where the run is in its data."""
        return f"{self.samples_done} samples consumed"

    @property
    def only_finite(self) -> bool:
        """A checkpoint with NaN or infinite weights does not count."""
        return self.config.on_nan != finite.IGNORE

    @property
    def spoilt_ends(self) -> bool:
        """The attempt ends if the checkpoint of this boundary is not finite: losses and gradients were."""
        return self.only_finite and not self.watch.row

    spoilt_remedy = "--on-nan ignore trains on"

    def counters(self) -> dict[str, Any]:
        """The values of this loop that a checkpoint holds."""
        return {
            "step": self.done,
            "evaluated": self.evaluated,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "watch": self.watch.state_dict(),
            **({"enough": self.max_steps} if self.enough else {}),
        }

    def collect(self) -> State:
        """The live tensors and values, in the form that a checkpoint holds."""
        extra = {name: thing.state_dict() for name, thing in self.extra.items()}
        return collect(self.model, [self.optimizer], self.counters(), extra, [self._begun], self._made, self.base)

    def streams(self) -> torch.Tensor:
        """This rank's random streams."""
        return rng.save_streams()

    @property
    def device_name(self) -> str:
        """The kind of the model's device."""
        return torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the settings, the machine and the data."""
        return {
            "config": {**self.config.to_json(), "micro_batch_size": self.micro_batch_size},
            "machine": {"device": self.device_name, **machine_facts(self.threads)},
            "tokens": self._tokens,
            "until": self.max_steps,
        }

    def load(self, restored: Restored) -> None:
        """Load a checkpoint into the model, the optimizer, the extra objects, the scaler and this loop.

        Raises:
            StateError: the checkpoint does not fit them.
            RunError: the run is past `max_steps` already.
        """
        facts = restored.manifest.facts
        counters, extra = apply(
            self.model, [self.optimizer], restored.tensors, restored.plain, [self._begun], self._made
        )
        self._load_extra(extra, str(restored.name))
        if self.scaler and counters.get("scaler"):
            self.scaler.load_state_dict(counters["scaler"])
        self.done, evaluated = restored.manifest.step, counters.get("evaluated")
        if counters.get("step") != self.done or type(evaluated) is not int:
            raise StateError(f"checkpoint {restored.name}: its state.json belongs to another step")
        self.evaluated = evaluated
        if self.done > self.max_steps:
            raise RunError(
                f"{self.config.checkpoint_dir} is already at step {self.done}, past max_steps ({self.max_steps}). "
                "Raise max_steps, or use another run name"
            )
        if restored.same_processes:
            if restored.streams is not None:
                rng.load_streams(restored.streams)
            machine = facts.get("machine")
            threads = machine.get("threads") if isinstance(machine, Mapping) else None
            if type(threads) is int and 0 < threads <= MAX_THREADS:
                self.threads = threads
            torch.set_num_threads(self.threads)
        self.watch.load_state_dict(counters.get("watch"))
        self.enough = counters.get("enough") == self.max_steps  # A run that was ended early is gone on with for more.
        samples = facts.get("samples")
        if type(samples) is int and samples >= 0:
            self.offset = samples - self.done * self.config.global_batch_size

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
