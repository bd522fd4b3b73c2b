"""An optimizer's state: by the names of its parameters, and whatever else it keeps.

The state is read from Optimizer.state. If an optimizer's own `state_dict` holds more (Lookahead keeps slow weights
beside another optimizer's state), that is saved instead, and restored through its `load_state_dict`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import memory_formats
from trainer.checkpoint.names import plain_name
from trainer.checkpoint.values import StateError

PREFIX = "optim."
"""The prefix of tensors that belong to a parameter: optim.<i>.<parameter>.<name>."""
_PARAMETER = "parameter"
"""Marks a key that is a parameter in an optimizer's own state_dict."""

Groups = list[dict[str, Any]]
"""The options of an optimizer's parameter groups."""


def options_of(optimizer: torch.optim.Optimizer) -> Groups:
    """The options of each parameter group: all but its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


# -- saved -------------------------------------------------------------------------------------------------------------


def collect(
    index: int, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors that belong to a parameter by name, the rest as a tree of values and tensors).

    Raises:
        StateError: a part of it would be lost; the message names it.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    who = f"optimizer {index} ({type(optimizer).__name__})"
    _check(optimizer, names, who)
    own = _own_state_dict(optimizer, who)
    rest: dict[str, Any] = {"state": {}, "groups": options_of(optimizer)}
    if own is not None:
        return {}, {**rest, "own": _marked(own, names, who)}
    tensors: dict[str, torch.Tensor] = {}
    others = []
    for owner, values in optimizer.state.items():
        if not isinstance(owner, torch.Tensor) or not isinstance(values, Mapping):
            others.append([_marked_key(owner, names, who), _marked(values, names, who)])
            continue
        name = _name_of(owner, names, who)
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and isinstance(key, str) and key and "." not in key:
                tensors[f"{PREFIX}{index}.{name}.{key}"] = value
            else:
                rest["state"].setdefault(name, {})[key] = value
    return tensors, {**rest, "others": others} if others else rest


def _check(optimizer: torch.optim.Optimizer, names: Mapping[int, str], who: str) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _name_of(parameter, names, who)


def _name_of(parameter: torch.Tensor, names: Mapping[int, str], who: str) -> str:
    if id(parameter) not in names:
        raise StateError(
            f"{who} holds a parameter that the model does not have, {tuple(parameter.shape)}: its state would be lost. "
            "Construct it from model.parameters(), or make the tensor a parameter of the model"
        )
    return names[id(parameter)]


def _own_state_dict(optimizer: torch.optim.Optimizer, who: str) -> Any:
    """The state_dict of an optimizer that defines its own; None if Optimizer.state and the groups hold everything."""
    plain = getattr(type(optimizer), "state_dict", None) is torch.optim.Optimizer.state_dict
    if plain and not optimizer._optimizer_state_dict_post_hooks:
        for name, inner in _inner(optimizer):
            if inner.state is not optimizer.state:
                raise StateError(
                    f"{who} keeps another optimizer in .{name}, and its state_dict() leaves that out: its state would "
                    "be lost. Give it a state_dict and a load_state_dict that include it"
                )
        return None
    try:
        own = optimizer.state_dict()
    except Exception as error:
        raise StateError(f"{who}: state_dict() failed: {type(error).__name__}: {error}") from error
    if _holds_no_more(own, optimizer):
        return None
    if not callable(getattr(optimizer, "load_state_dict", None)):
        raise StateError(f"{who} has a state_dict but no load_state_dict: its state would be lost")
    return own


def _inner(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    for name, value in vars(optimizer).items():
        several = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        for one in several:
            if isinstance(one, torch.optim.Optimizer):
                yield name, one


def _holds_no_more(own: Any, optimizer: torch.optim.Optimizer) -> bool:
    """True if a state_dict holds just what Optimizer.state and the groups hold."""
    if not isinstance(own, Mapping) or own.keys() != {"state", "param_groups"}:
        return False
    options = [group.keys() - {"params"} for group in own["param_groups"]]
    if options != [group.keys() - {"params"} for group in optimizer.param_groups]:
        return False
    return _leaves(own["state"]) == _leaves(getattr(optimizer, "state", None))


def _leaves(tree: Any) -> tuple[set[int], int]:
    """(ids of the tensors among the values of a tree, the number of values)."""
    found, count, left = set[int](), 0, [tree]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)
        else:
            count += 1
            if isinstance(value, torch.Tensor):
                found.add(id(value))
    return found, count


def _marked(tree: Any, names: Mapping[int, str], who: str) -> Any:
    """A tree in which each key that is a parameter is replaced by its name, marked."""
    if isinstance(tree, Mapping):
        return {_marked_key(key, names, who): _marked(value, names, who) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_marked(value, names, who) for value in tree)
    return tree


def _marked_key(key: Any, names: Mapping[int, str], who: str) -> Any:
    if isinstance(key, torch.Tensor):
        return _PARAMETER, _name_of(key, names, who)
    if type(key) is int and key in names:
        raise StateError(
            f"{who}: state_dict() names parameters by id(), which differs in the next attempt: their state would be "
            "lost. Use their numbers or names as keys"
        )
    return key


# -- restored ----------------------------------------------------------------------------------------------------------


def by_parameter(
    tensors: Mapping[str, torch.Tensor], named: Mapping[str, nn.Parameter], aside: set[str]
) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The saved tensors that belong to parameters, by optimizer number, parameter and name; in one pass.

    Args:
        tensors: All saved tensors.
        named: The model's parameters.
        aside: Names of the tensors that belong to the tree of values.
    """
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX) or name in aside:
            continue
        _, index, rest = name.split(".", 2)
        parameter, _, key = rest.rpartition(".")
        while plain_name(parameter) not in named and "." in parameter:  # An older release saved dotted keys so.
            parameter, _, more = parameter.rpartition(".")
            key = f"{more}.{key}"
        found.setdefault(index, {}).setdefault(plain_name(parameter), {})[key] = tensor
    return found


def plan(
    index: int,
    optimizer: torch.optim.Optimizer,
    saved: Any,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    named: Mapping[str, nn.Parameter],
    begun: Groups,
    formatted: bool,
) -> Callable[[], None]:
    """A function that loads a saved state into an optimizer; until it is called nothing changes.

    Args:
        index: The optimizer's number.
        optimizer: The optimizer.
        saved: The tree of values that are no tensors of a parameter.
        tensors: By parameter and name.
        named: The model's parameters.
        begun: The optimizer's options as the program made them.
        formatted: Whether the tensors have the memory formats that they were saved in.

    Raises:
        StateError: the state does not fit.
    """
    who = f"optimizer {index} ({type(optimizer).__name__})"
    _check(optimizer, {id(parameter): name for name, parameter in named.items()}, who)
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise StateError(
            f"optimizer {index} has {len(optimizer.param_groups)} parameter groups; the checkpoint has "
            f"{len(saved['groups'])}"
        )
    kept = [
        {key for key in now if key in then and not _alike(now[key], then[key])}
        for now, then in zip(begun, saved.get("begun", ()), strict=False)
    ]
    if "own" in saved:
        return lambda: _load_own(optimizer, _unmarked(saved["own"], named), begun, kept, who)
    state = _state_on_devices(optimizer, saved, tensors, named, formatted)
    options = [dict(group) for group in saved["groups"]]
    for group, names in zip(options, kept, strict=False):
        for name in names & group.keys():
            del group[name]

    def load() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, saved_options in zip(optimizer.param_groups, options, strict=True):
            group.update(saved_options)

    return load


def _state_on_devices(
    optimizer: torch.optim.Optimizer,
    saved: Any,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    named: Mapping[str, nn.Parameter],
    formatted: bool,
) -> dict[Any, Any]:
    """The contents for Optimizer.state, each tensor on the device where the optimizer keeps it."""
    on_device = {
        id(parameter): bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    state: dict[Any, Any] = {}
    plain = {plain_name(name): values for name, values in saved["state"].items()}
    for name, parameter in named.items():
        values = moved(plain.get(name, {}), parameter.device)
        for key, tensor in tensors.get(name, {}).items():
            device = parameter.device if key != "step" or on_device.get(id(parameter)) else torch.device("cpu")
            if not formatted and tensor.shape == parameter.shape:
                tensor = memory_formats.relaid(tensor, parameter.stride())  # As an optimizer makes its state.
            values[key] = tensor.to(device)
        if values:
            state[parameter] = values
    device = next(iter(named.values())).device if named else torch.device("cpu")
    for key, value in saved.get("others", ()):
        state[_unmarked_key(key, named)] = moved(_unmarked(value, named), device)
    return state


def _load_own(optimizer: torch.optim.Optimizer, own: Any, begun: Groups, kept: Sequence[set[str]], who: str) -> None:
    try:
        optimizer.load_state_dict(own)
    except Exception as error:
        raise StateError(f"{who}: load_state_dict() failed: {type(error).__name__}: {error}") from error
    for group, now, names in zip(optimizer.param_groups, begun, kept, strict=False):
        group.update({name: now[name] for name in names})


def _unmarked(tree: Any, named: Mapping[str, nn.Parameter]) -> Any:
    if isinstance(tree, Mapping):
        return {_unmarked_key(key, named): _unmarked(value, named) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_unmarked(value, named) for value in tree)
    return tree


def _unmarked_key(key: Any, named: Mapping[str, nn.Parameter]) -> Any:
    if type(key) is tuple and len(key) == 2 and key[0] == _PARAMETER and key[1] in named:
        return named[key[1]]
    return key


def moved(value: Any, device: torch.device) -> Any:
    """A tree of an optimizer's values, its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        found = copy.copy(value)  # Of its own type: an OrderedDict, for example.
        found.update({key: moved(item, device) for key, item in value.items()})
        return found
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    if isinstance(value, tuple):
        return tuple.__new__(type(value), [moved(item, device) for item in value])
    return value


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return bool(torch.as_tensor(one).cpu().equal(torch.as_tensor(other).cpu()))
    return bool(one == other)
