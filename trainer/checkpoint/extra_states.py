"""Extra state of modules: what `get_extra_state` returns, which a module keeps besides its parameters and buffers."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.names import modules
from trainer.checkpoint.optimizers import moved
from trainer.checkpoint.typed import form_of
from trainer.checkpoint.values import StateError


def collect(model: nn.Module) -> dict[str, Any]:
    """The results of `get_extra_state`, by module; not copies."""
    found = {}
    for name, module in modules(model).items():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[name] = module.get_extra_state()
    return found


# -- set aside and put back --------------------------------------------------------------------------------------------


def keep(model: nn.Module) -> dict[str, Any]:
    """A copy of every extra state that can be put back; tensors are copied where they are."""
    return {
        name: _copy(module.get_extra_state())
        for name, module in modules(model).items()
        if type(module).get_extra_state is not nn.Module.get_extra_state and _can_be_set(module)
    }


def put_back(model: nn.Module, kept: Mapping[str, Any]) -> None:
    """Restore the kept extra states. A module that is gone since is left out."""
    by_name = modules(model) if kept else {}
    for name, value in kept.items():
        if name in by_name:
            by_name[name].set_extra_state(_copy(value))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping) and not form_of(value):
        return {key: _copy(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(one) for one in value)
    if type(value) is io.BytesIO:
        found = io.BytesIO(value.getvalue())
        found.seek(value.tell())
        return found
    if form_of(value):  # A set or an array, for example.
        return copy.deepcopy(value)
    return value  # It cannot change, or it cannot be saved and is refused before the first step.


def _can_be_set(module: nn.Module) -> bool:
    return type(module).set_extra_state is not nn.Module.set_extra_state


# -- restored ----------------------------------------------------------------------------------------------------------


def plan(model: nn.Module, saved: Any) -> list[tuple[nn.Module, Any]]:
    """(module, its extra state) of each that has one.

    Raises:
        StateError: the checkpoint and the model have extra states of different modules.
    """
    if saved is None:  # An older release did not save it.
        return []
    live = collect(model)
    if not isinstance(saved, Mapping):
        raise StateError("state.json holds no extra state of modules")
    for name in sorted(saved.keys() ^ live.keys(), key=str):
        where = "the checkpoint" if name in live else "the model"
        raise StateError(f"model.{name}: its extra state (get_extra_state) is not in {where}")
    found = modules(model)
    for name in saved:
        if not _can_be_set(found[name]):
            raise StateError(f"model.{name} has get_extra_state and no set_extra_state: it could not be restored")
    return [(found[name], _where_it_was(live[name], value)) for name, value in saved.items()]


def _where_it_was(live: Any, saved: Any) -> Any:
    """The saved values, with each tensor on the device of the live one."""
    if isinstance(live, torch.Tensor):
        return moved(saved, live.device)
    if isinstance(live, Mapping) and isinstance(saved, dict):
        found = copy.copy(saved)  # Of its own type.
        found.update({key: _where_it_was(live.get(key), value) for key, value in saved.items()})
        return found
    return saved
