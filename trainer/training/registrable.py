"""Registrable: what can be registered, and the state of what is neither a module nor an optimizer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.checkpoint.state import StateError
from trainer.checkpoint.values import is_plain
from trainer.errors import RunError
from trainer.training.accelerate_loader import is_prepared

_FLATTENED = {"FullyShardedDataParallel": "FSDP1", "DeepSpeedEngine": "DeepSpeed"}
"""The class names of modules that cannot be saved, and the libraries that make them."""


def refuse_flattened(what: str, module: nn.Module) -> None:
    """Refuse a module of FSDP1 or DeepSpeed, whose parameters have lost their names and shapes.

    Args:
        what: The argument, as the message names it.
        module: The module.

    Raises:
        RunError: it is one.
    """
    classes = {one.__name__ for part in module.modules() for one in type(part).__mro__}
    for kind in sorted(classes & _FLATTENED.keys()):
        raise RunError(
            f"{what}: {kind} ({_FLATTENED[kind]}) cannot be saved. Use FSDP2's fully_shard; with accelerate, "
            "fsdp_version=2"
        )


def refuse_strangers(call: str, models: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Refuse an optimizer of parameters that no registered module has.

    Args:
        call: The method that the program called.
        models: Holds the registered modules.
        optimizers: The registered optimizers, by name.

    Raises:
        RunError: one has such a parameter; the message names it.
    """
    known = {id(parameter) for parameter in models.parameters()}
    for name, optimizer in optimizers.items():
        for parameter in (one for group in optimizer.param_groups for one in group["params"]):
            if id(parameter) not in known:
                raise RunError(
                    f"{call}({name}=...): it trains a parameter of no registered module (shape "
                    f"{tuple(parameter.shape)}). Register the module before it, or in the same call"
                )


def refuse_unsavable(call: str, name: str, thing: Any, values: str) -> None:
    """Refuse an object whose state cannot be read.

    Args:
        call: The method that the program called.
        name: The object's name.
        thing: Neither a module nor an optimizer.
        values: Where plain values belong instead: "run.state", for example.

    Raises:
        RunError: it is a prepared loader, or lacks `state_dict` or `load_state_dict`.
    """
    if is_prepared(thing):
        raise RunError(
            f"{call}({name}=...): a loader that accelerate has prepared is not registered. run.steps() continues it "
            "at the right batch by itself"
        )
    if not is_generator(thing):
        is_value = is_plain(thing) and not hasattr(thing, "state_dict")
        remedy = f"Put it into {values}: {values}[{name!r}] = ..." if is_value else _REMEDY.format(values)
        refuse_stateless(f"{call}({name}=...)", thing, remedy)


_REMEDY = "Give it both, or put what changes in it into {}"


def refuse_stateless(what: str, thing: Any, remedy: str) -> None:
    """Refuse an object without `state_dict` and `load_state_dict`.

    Args:
        what: The argument, as the message names it.
        thing: The object.
        remedy: What to do instead, a sentence.

    Raises:
        RunError: it lacks one of them.
    """
    if not has_state(thing):
        raise RunError(f"{what}: {type(thing).__name__} has no state_dict and load_state_dict. {remedy}")


def has_state(thing: Any) -> bool:
    """True for an object with `state_dict` and `load_state_dict`."""
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def is_generator(thing: Any) -> bool:
    """True for a random number generator of torch's, numpy's or Python's."""
    return isinstance(thing, (torch.Generator, np.random.Generator, random.Random))


def state_of(thing: Any) -> Any:
    """The state of a generator, or of an object with a `state_dict`."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, np.random.Generator):
        return dict(thing.bit_generator.state)
    return thing.getstate() if isinstance(thing, random.Random) else thing.state_dict()


def load_into(name: str, thing: Any, saved: Any) -> None:
    """Put a state of `state_of` back.

    Raises:
        StateError: the object refuses it; the message names the object.
    """
    try:
        if isinstance(thing, torch.Generator):
            thing.set_state(saved)
        elif isinstance(thing, np.random.Generator):
            thing.bit_generator.state = saved
        elif isinstance(thing, random.Random):
            thing.setstate(saved)
        else:
            thing.load_state_dict(saved)
    except Exception as error:
        raise StateError(f"{name}: {type(thing).__name__}.load_state_dict failed: {error}") from error
