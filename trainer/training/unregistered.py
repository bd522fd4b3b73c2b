"""Unregistered: optimizers and gradient scalers of the program that are used and that no checkpoint holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from trainer.errors import RunError
from trainer.training.accelerate_state import plain_optimizer
from trainer.training.registered import Registered

DEPTH = 3
"""How deep in a registered object its optimizers are looked for."""


class Watch:
    """Looks at each optimizer of the process before it steps."""

    _hook: ClassVar[RemovableHandle | None] = None
    """One attempt at a time steps in a process; an earlier one may have ended with an error."""

    def __init__(
        self,
        contents: Registered,
        await_copied: Callable[[], None],
        print_line: Callable[[str], None],
        is_over: Callable[[], bool],
    ) -> None:
        """Begin, once everything is registered.

        Args:
            contents: What is registered.
            await_copied: Waits until registered parameters may change.
            print_line: Prints a line, on rank 0.
            is_over: Tells that the attempt has ended.
        """
        self.close()
        self._contents, self._await_copied = contents, await_copied
        self._print_line, self._is_over = print_line, is_over
        self._registered = {id(optimizer) for optimizer in contents.optimizers.values()}
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), (Optimizer, torch.amp.GradScaler))]
        self._made = WeakSet(thing for thing in found if isinstance(thing, Optimizer))
        """What the program could have registered. One that it makes in its loop may be new in each step on purpose."""
        self._scalers = [thing for thing in found if isinstance(thing, torch.amp.GradScaler)]
        self._waits: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        """Of the optimizers that are not registered: whether they step registered parameters."""
        self._has_named = False
        Watch._hook = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Look no more."""
        if Watch._hook:
            Watch._hook.remove()
        Watch._hook, self._scalers = None, []

    def end_first_step(self) -> None:
        """Let go of the scalers: those that are used were seen."""
        self._scalers = []

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_over():
            self.close()
            return
        optimizer = plain_optimizer(optimizer)
        if id(optimizer) in self._registered:
            self._name_scaler(optimizer)
            return
        if optimizer not in self._waits:
            self._waits[optimizer] = self._steps_registered(optimizer)
        if self._waits[optimizer]:
            self._await_copied()

    def _steps_registered(self, optimizer: Optimizer) -> bool:
        """True if an optimizer that is not registered steps a parameter that is.

        Raises:
            RunError: its state would be lost.
        """
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        modules = self._contents.models._modules.items()
        names = [name for name, one in modules if one and not stepped.isdisjoint(map(id, one.parameters()))]
        if not names:
            return False
        if self._contents.loop != "steps":  # A framework saves its optimizers itself.
            return True
        wraps = any(id(one) in self._registered for one in _inside(vars(optimizer)))  # As SAM does.
        if wraps or any(optimizer is one for one in _saved_with(self._contents)):
            return True
        kind = type(optimizer).__name__
        if optimizer in self._made:
            raise RunError(
                f"an optimizer ({kind}) of {names[0]!r} is not registered, so its state would be lost. Register it "
                "before the first step: run.register(optimizer=...)"
            )
        if not self._has_named:
            self._has_named = True
            self._print_line(
                f"An optimizer ({kind}) of {names[0]!r} was made after the first call of run.steps(), and its state is "
                "not saved. If later steps need it, make it before the loop and register it."
            )
        return True

    def _name_scaler(self, optimizer: Optimizer) -> None:
        known = [id(thing) for thing in self._contents.others.values()]
        for scaler in list(self._scalers) if self._contents.loop == "steps" else []:
            if id(optimizer) in scaler._per_optimizer_states and id(scaler) not in known:
                self._scalers.remove(scaler)
                self._print_line(
                    "A GradScaler is used and is not registered: after a resume its scale would start over. Register "
                    "it: run.register(scaler=...)."
                )


def _saved_with(contents: Registered) -> Iterator[Optimizer]:
    """The optimizers inside registered objects whose state_dict holds theirs."""
    for optimizer in contents.optimizers.values():
        yield from _inside(vars(optimizer))
    for thing in contents.others.values():
        if not isinstance(thing, LRScheduler) and hasattr(thing, "__dict__"):
            held = list(_inside(vars(thing)))
            if held and _has_groups(thing.state_dict()):
                yield from held
    for module in contents.models.modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield from _inside(vars(module))


def _inside(thing: Any, depth: int = DEPTH) -> Iterator[Optimizer]:
    if isinstance(thing, Optimizer):
        yield thing
    if not depth or isinstance(thing, (LRScheduler, nn.Module, torch.Tensor, type, ModuleType)):
        return
    if isinstance(thing, (list, tuple)):
        values = list(thing)
    else:
        values = list((thing if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})).values())
    for value in values:
        yield from _inside(value, depth - 1)


def _has_groups(saved: Any, depth: int = DEPTH) -> bool:
    """True if a state_dict holds one of an optimizer."""
    if not depth or not isinstance(saved, (Mapping, list, tuple)):
        return False
    if isinstance(saved, Mapping):
        return "param_groups" in saved or any(_has_groups(value, depth - 1) for value in saved.values())
    return any(_has_groups(value, depth - 1) for value in saved)
