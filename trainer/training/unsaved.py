"""Unsaved: what a step changes and no checkpoint holds: attributes that are in no state_dict, and schedulers.

After a resume they would have their first value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainer.checkpoint.names import modules
from trainer.training.participant import Participant
from trainer.training.registered import Registered

Attributes = dict[tuple[str, str], Any]
"""By (object, attribute): a number, a text, or the sum and shape of a tensor."""


def attributes(models: nn.Module, others: Mapping[str, Any]) -> Attributes:
    """The values that can be compared, of all objects whose state_dict does not name them.

    The attributes of loaders are the affair of their libraries.
    """
    found: Attributes = {}
    for name, module in modules(models).items():
        if name:
            found |= {(name, key): value for key, value in _plain(vars(module), _own_state(module))}
    for name, thing in others.items():
        if isinstance(thing, DataLoader):
            continue
        if hasattr(thing, "__dict__") and callable(getattr(thing, "state_dict", None)):
            found |= {(name, key): value for key, value in _plain(vars(thing), thing.state_dict())}
    return found


def changed(before: Attributes, after: Attributes) -> list[str]:
    """Names of the attributes that have another value now: `object.attribute`."""
    return [f"{name}.{key}" for (name, key), value in sorted(after.items()) if before.get((name, key), value) != value]


def report(run: Participant, contents: Registered, before: Attributes, same_batches: bool) -> None:
    """Record what is registered, and name what the first step has changed and no checkpoint holds.

    Args:
        run: The attempt.
        contents: What is registered.
        before: The attributes before the step.
        same_batches: Several ranks all trained on one batch; recorded for the rehearsal.
    """
    lost = changed(before, attributes(contents.models, contents.others))
    lost = [name for name in lost if name.rpartition(".")[2] not in contents.known]
    if run.journal:
        run.journal.event(
            "registered", loop=contents.loop, objects=contents.kinds(), unsaved=lost,
            scheduled=_scheduled(contents.optimizers, contents.others), same_batches=same_batches,
        )  # fmt: skip
    for name in _unscheduled(contents.optimizers, contents.others):
        run.print_line(
            f"A scheduler sets the learning rate of {name!r} and is not registered: after a resume it would start "
            "over. Register it: run.register(scheduler=...)."
        )
    for name in lost:
        run.print_line(
            f"{name} changes during training, and its object's state_dict() does not hold it: it is not saved, and "
            "a resume begins with its first value. Put it into the state_dict, or into run.state."
        )


def _own_state(module: nn.Module) -> Mapping[str, Any]:
    """What a module's state_dict holds of itself, without its children: they have a turn of their own."""
    if type(module).state_dict is not nn.Module.state_dict:
        return module.state_dict()
    found: dict[str, Any] = {}
    module._save_to_state_dict(found, "", False)
    return found


def _plain(values: Mapping[str, Any], saved: object) -> Iterator[tuple[str, Any]]:
    names = {str(name).strip("_") for name in _keys(saved)}
    for key, value in values.items():
        if key == "training" or key.strip("_") in names:
            continue
        if isinstance(value, (bool, int, float, str, np.generic)):
            yield key, value
        elif isinstance(value, torch.Tensor) and value.numel() <= 1 << 16 and not isinstance(value, nn.Parameter):
            yield key, (tuple(value.shape), float(value.detach().double().sum()))


def _keys(saved: object) -> Iterable[Any]:
    return saved.keys() if isinstance(saved, Mapping) else ()


def _schedules(thing: object, optimizer: torch.optim.Optimizer, depth: int = 3) -> bool:
    """True if a registered object is a scheduler of the optimizer, or wraps one."""
    held = [getattr(thing, name, None) for name in ("optimizer", "scheduler", "_schedulers")]
    held += held.pop() or []
    return depth > 0 and any(
        one is optimizer or (one is not None and _schedules(one, optimizer, depth - 1)) for one in held
    )


def _scheduled(optimizers: Mapping[str, torch.optim.Optimizer], others: Mapping[str, Any]) -> list[str]:
    """Names of the optimizers with a registered scheduler."""
    return [
        name for name, optimizer in optimizers.items() if any(_schedules(thing, optimizer) for thing in others.values())
    ]


def _unscheduled(optimizers: Mapping[str, torch.optim.Optimizer], others: Mapping[str, Any]) -> list[str]:
    """Names of the optimizers with a scheduler of torch's of which none is registered."""
    have = _scheduled(optimizers, others)
    return [
        name
        for name, optimizer in optimizers.items()
        if hasattr(optimizer.step, "_wrapped_by_lr_sched") and name not in have
    ]
