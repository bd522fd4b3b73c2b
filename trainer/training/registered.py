"""Registered: the contents of a run whose loop is the user's own: modules, optimizers and other objects, by name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import buffers
from trainer.checkpoint.finite import watched
from trainer.checkpoint.frozen import Frozen
from trainer.checkpoint.names import unwrap
from trainer.checkpoint.optimizers import Groups
from trainer.checkpoint.state import State, StateError, apply, collect, not_seen, options_of
from trainer.checkpoint.values import decode, encode
from trainer.errors import RunError
from trainer.training import accelerate_state
from trainer.training.changes import machine_facts
from trainer.training.contents import Restored
from trainer.training.current_gpu import make_current
from trainer.training.data_place import DataPlace
from trainer.training.kept import Kept
from trainer.training.partial import part_of
from trainer.training.registrable import (
    is_generator,
    load_into,
    refuse_flattened,
    refuse_strangers,
    refuse_unsavable,
    state_of,
)

STATE = "run.state"
"""The name of `SpotRun.state` among the extras; no registered object can have it."""


class Registered:
    """What a user's loop changes; the session saves it, and loads it in place."""

    def __init__(self, only_finite: bool, config: Mapping[str, Any]) -> None:
        """Begin with nothing registered.

        Args:
            only_finite: Whether a checkpoint with NaN or infinite weights does not count.
            config: The settings, for the manifests; `max_steps` follows when it is known.
        """
        self.only_finite, self.config = only_finite, dict(config)
        self.done = 0
        self.data = DataPlace()
        self.state: dict[str, Any] = {}
        self.models = nn.Module()
        """Holds the registered modules; its own name is no part of theirs."""
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.others: dict[str, Any] = {}
        self.loop = "steps"
        """By whose loop it is trained, for the records."""
        self.known: frozenset[str] = frozenset()
        """Names of attributes that hooks of the program save, although no state_dict holds them."""
        self.watched: frozenset[str] = frozenset()
        self._scalers: list[tuple[str, Any]] = []
        """By the name of the optimizer that accelerate has wrapped with it."""
        self._begun: dict[str, Groups] = {}
        """By optimizer: its options as the program made them."""
        self._made: buffers.Forms = {}
        self._base: Frozen | None = None
        self._missing: list[str] = []
        """Names in the checkpoint that are not registered yet."""
        self.last_boundary: Kept | None = None
        """What is saved in place of the present state, once a stop has dropped the micro-steps after it."""

    # -- registered objects --------------------------------------------------------------------------------------------

    def add(self, objects: Mapping[str, Any], call: str = "register", values: str = "run.state") -> list[str]:
        """Add objects by name; returns lines to print.

        Args:
            objects: As the program gave them.
            call: The method that it called, for messages.
            values: Where plain values belong, for messages.

        Raises:
            RunError: an object cannot be saved, or comes too late; the message names it.
        """
        lines = []
        for name, thing in sorted(objects.items()):
            if name in self.others or name in self.optimizers or name in self.models._modules:
                raise RunError(f"{call}({name}=...): {name} is registered already")
            if isinstance(thing, nn.Module):
                refuse_flattened(f"{call}({name}=...)", thing)
                # Set directly: add_module refuses names of nn.Module's own attributes.
                self.models._modules[name] = unwrap(thing)
                if unseen := not_seen(thing):
                    lines.append(
                        f"Not saved: {', '.join(unseen[:5])} of {name}. They are in its state_dict(), but are neither "
                        "parameters nor buffers; implement get_extra_state and set_extra_state to save them."
                    )
            elif isinstance(thing, torch.optim.Optimizer):
                if scaler := accelerate_state.scaler_of(thing):
                    self._scalers.append((name, scaler))
                self.optimizers[name] = optimizer = accelerate_state.plain_optimizer(thing)
                self._begun[name] = copy.deepcopy(options_of(optimizer))
            else:
                refuse_unsavable(call, name, thing, values)
                self.others[name] = thing
        # In one order, whatever the order of the calls: names of shared parameters depend on it.
        self.optimizers = dict(sorted(self.optimizers.items()))
        self.models._modules = dict(sorted(self.models._modules.items()))
        refuse_strangers(call, self.models, self.optimizers)
        make_current(self.models.parameters())
        self._made = buffers.forms(self.models) | self._made  # As the program made them, not as they were restored.
        self.watched |= watched(self.models)
        known, self._base = self._base, Frozen(self.models, self._base)
        lines += [self._base.line] if self._base.line and (known is None or known.line != self._base.line) else []
        return lines

    def refuse_missing(self) -> None:
        """Refuse to train on without an object that the checkpoint has, or that accelerate uses.

        Raises:
            StateError: one is not registered; the message names it.
            RunError: the same of a gradient scaler.
        """
        accelerate_state.refuse_lost_scaler(self._scalers, self.others.values())
        for name in self._missing:
            raise StateError(
                f"the checkpoint has {name!r}, which is not registered and would be lost. Register it before the first "
                "step, or start a new run"
            )

    # -- contents ------------------------------------------------------------------------------------------------------

    @property
    def samples_done(self) -> int:
        """Steps: the number of samples is not known."""
        return self.done

    @property
    def position(self) -> str:
        """Where the run is in its data."""
        return f"epoch {self.data.epoch}, {self.data.samples} of its samples consumed"

    @property
    def spoilt_ends(self) -> bool:
        """The attempt ends if the checkpoint of this boundary is not finite."""
        return self.only_finite

    spoilt_remedy = ""

    @property
    def may_swap(self) -> bool:
        """The program may put other weights into a model between two steps: averaged ones, for an evaluation.

        True if a registered object holds tensors beside the trained models, as EMA copies do, or if an optimizer has an
        `eval` method, as schedule-free ones do. No copy may be under way then: a write through `.data`
        cannot be seen.
        """
        trained = {
            id(parameter)
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for module in self.models._modules.values():
            held = {id(parameter) for parameter in module.parameters()} if module else set()
            if held and not held & trained:
                return True
        if any(callable(getattr(optimizer, "eval", None)) for optimizer in self.optimizers.values()):
            return True
        found: dict[str, torch.Tensor] = {}
        encode({name: state_of(thing) for name, thing in self.others.items() if not is_generator(thing)}, "", found)
        return bool(found)

    def collect(self) -> State:
        """The live tensors and values, in the form that a checkpoint holds."""
        if self.last_boundary:
            return self.last_boundary.state
        counters = {
            "step": self.done,
            **self.data.counters(),
            "objects": self._names(),
            "optimizers": list(self.optimizers),
        }
        extra = {name: state_of(thing) for name, thing in self.others.items()} | {STATE: dict(self.state)}
        optimizers = list(self.optimizers.values())
        try:
            return collect(self.models, optimizers, counters, extra, self._options(), self._made, self._base)
        except StateError as error:
            raise StateError(str(error).removeprefix("extra.")) from None

    def _options(self) -> list[Groups]:
        return [self._begun[name] for name in self.optimizers]

    def _names(self) -> list[str]:
        return sorted([*self.models._modules, *self.optimizers, *self.others])

    def kinds(self) -> dict[str, str]:
        """The registered objects' classes, by name."""
        held = {**self.models._modules, **self.optimizers, **self.others}
        return {name: type(thing).__name__ for name, thing in sorted(held.items())}

    def streams(self) -> torch.Tensor:
        """This rank's place in its data, and its random streams."""
        return self.last_boundary.streams if self.last_boundary else self.data.streams()

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the settings and the machine."""
        return {"config": self.config, "machine": machine_facts()}

    def load(self, restored: Restored) -> None:
        """Load a checkpoint into the registered objects, as far as it has them.

        Raises:
            StateError: an object is not in the checkpoint, or does not fit.
        """
        saved = decode(restored.plain.get("counters"), restored.tensors)
        if not isinstance(saved, dict) or not isinstance(saved.get("objects"), list):
            raise StateError(f"checkpoint {restored.name} was not saved by a loop with run.register()")
        names = saved["objects"]
        for name in self._names():
            if name not in names:
                raise StateError(
                    f"{name!r} is registered, but checkpoint {restored.name} does not have it. It has "
                    f"{', '.join(names)}. Remove it, or start a new run"
                )
        self._missing = [name for name in names if name not in self._names()]
        here = [name in self.optimizers for name in saved.get("optimizers", self.optimizers)]
        tensors, plain = part_of(restored.tensors, restored.plain, self._missing, here)
        optimizers = list(self.optimizers.values())
        counters, extra = apply(self.models, optimizers, tensors, plain, self._options(), self._made)
        if counters.get("step") != restored.manifest.step:
            raise StateError(f"checkpoint {restored.name}: its state.json belongs to another step")
        for name, thing in self.others.items():
            load_into(name, thing, extra[name])
        self.state.clear()
        self.state.update(extra.get(STATE, {}))
        self.done = restored.manifest.step
        self.data.load(counters, restored)
