"""Unsaved: attributes that a step changes and no state_dict holds. After a resume they would have their first value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.checkpoint.names import modules

Attributes = dict[tuple[str, str], Any]
"""By (object, attribute): a number, a text, or the sum and shape of a tensor."""


def attributes(models: nn.Module, others: Mapping[str, Any]) -> Attributes:
    """The values that can be compared, of all objects whose state_dict does not name them."""
    found: Attributes = {}
    for name, module in modules(models).items():
        if name:
            found |= {(name, key): value for key, value in _plain(vars(module), _own_state(module))}
    for name, thing in others.items():
        if hasattr(thing, "__dict__") and callable(getattr(thing, "state_dict", None)):
            found |= {(name, key): value for key, value in _plain(vars(thing), thing.state_dict())}
    return found


def changed(before: Attributes, after: Attributes) -> list[str]:
    """Names of the attributes that have another value now: `object.attribute`."""
    return [f"{name}.{key}" for (name, key), value in sorted(after.items()) if before.get((name, key), value) != value]


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
