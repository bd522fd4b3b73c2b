"""What a training run is made of at a boundary: named tensors, and a small tree of plain values.

Names: `model.<fqn>` for parameters and buffers, `optim.<i>.<fqn>.<name>` for the optimizer's tensors, `extra.<path>`
for the tensors in what a user registered. Everything that is not a tensor goes into one tree of JSON with tagged
types. No value is ever pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import SAVED_DTYPES
from trainer.names import unwrap
from trainer.reading import Tensor
from trainer.shards import Box, box_here, is_cut, like

RANDOM = "rng."
"""What the names of the ranks' random streams begin with."""

Groups = list[dict[str, Any]]
"""The options of an optimizer's parameter groups."""


class StateError(Exception):
    """A state cannot be saved, or does not fit the model that it should be loaded into."""


@dataclass(frozen=True)
class State:
    """Everything that a step changes."""

    tensors: dict[str, torch.Tensor]
    """By name, sorted. The live tensors, not copies."""
    plain: dict[str, Any]
    """The rest, as tagged JSON (`encode`)."""
    buffers: frozenset[str]
    """Names of the model's buffers among the tensors."""
    steady: frozenset[str]
    """Names of the tensors that nothing changes before the optimizer's next step: parameters and optimizer state."""


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers by name, tied ones once; caches of types that cannot be saved are left out."""
    named = {f"model.{name}": tensor for name, tensor in unwrap(model).named_parameters()}
    buffers = {f"model.{name}": tensor for name, tensor in unwrap(model).named_buffers()}
    for prefix, module in unwrap(model).named_modules():
        for name in module._non_persistent_buffers_set:
            key = f"model.{prefix}.{name}" if prefix else f"model.{name}"
            if key in buffers and buffers[key].dtype not in SAVED_DTYPES:  # A table of rotations, say, in complex64.
                del buffers[key]
    return named | buffers


def options_of(optimizer: torch.optim.Optimizer) -> Groups:
    """What each parameter group says besides its parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def collect(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    counters: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    begun: Sequence[Groups] = (),
) -> State:
    """The state of a run at a boundary.

    Args:
        model: The model, wrapped or not.
        optimizers: Over its parameters.
        counters: Plain values.
        extra: What a user registered, by name.
        begun: `options_of` each optimizer as the program made it, so that a later change of the program's is seen.

    Raises:
        StateError: a value is neither a tensor nor plain, or a tensor of a type that cannot be saved; the message
        names its path.
    """
    tensors: dict[str, torch.Tensor] = model_tensors(model)
    names = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
    groups = []
    for index, optimizer in enumerate(optimizers):
        plain_state: dict[str, Any] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    raise StateError(f"optimizer {index} holds a parameter that the model does not have")
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"optim.{index}.{name}.{key}"] = value
                    else:
                        plain_state.setdefault(name, {})[key] = value
        first = {"begun": begun[index]} if begun else {}
        groups.append({"state": plain_state, "groups": options_of(optimizer), **first})
    steady = frozenset(tensors)
    plain = {
        "optim": encode(groups, "optim", tensors),
        "counters": encode(dict(counters), "counters", tensors),
        "extra": encode(dict(extra or {}), "extra", tensors),
    }
    for name, tensor in tensors.items():
        if tensor.dtype not in SAVED_DTYPES:
            raise StateError(f"{name}: {tensor.dtype} cannot be saved")
    buffers = frozenset(f"model.{name}" for name, _ in unwrap(model).named_buffers())
    return State(dict(sorted(tensors.items())), plain, buffers, steady - buffers)


def apply(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
    plain: Mapping[str, Any],
    begun: Sequence[Groups] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a state into a model and its optimizers; returns (counters, extra).

    Everything is checked before anything is changed. An option of an optimizer's that the program makes otherwise than
    the program did that saved the state (`begun`, as of `collect`) stays as the program makes it; the rest is restored.

    Raises:
        StateError: a tensor is missing, too many, or of another shape or dtype; the message names it.
    """
    wanted = model_tensors(model)
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for name in sorted(wanted.keys() ^ found.keys()):
        raise StateError(f"{name} is {'not in the checkpoint' if name in wanted else 'not in the model'}")
    for name, tensor in wanted.items():
        saved = found[name]
        if tensor.shape != saved.shape or tensor.dtype != saved.dtype:
            raise StateError(
                f"{name} is {tuple(saved.shape)} {saved.dtype} in the checkpoint, "
                f"{tuple(tensor.shape)} {tensor.dtype} in the model"
            )
    saved_optimizers = decode(plain.get("optim"), tensors)
    if not isinstance(saved_optimizers, list) or len(saved_optimizers) != len(optimizers):
        raise StateError(f"the checkpoint does not hold {len(optimizers)} optimizer(s)")
    named = dict(unwrap(model).named_parameters())
    try:
        restored = [
            _optimizer_state(index, optimizer, saved, tensors, named, begun[index] if begun else [])
            for index, (optimizer, saved) in enumerate(zip(optimizers, saved_optimizers, strict=True))
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(f"state.json holds no optimizer's state ({type(error).__name__}: {error})") from error
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
    for optimizer, (state, options) in zip(optimizers, restored, strict=True):
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, saved_options in zip(optimizer.param_groups, options, strict=True):
            group.update(saved_options)
    return decode(plain.get("counters"), tensors), decode(plain.get("extra"), tensors)


def wanted(live: State, stored: Mapping[str, Tensor], rank: int) -> dict[str, Box]:
    """What a rank needs of a checkpoint's tensors: of those that are cut over the ranks its own part, of others all.

    An optimizer's state is cut as the parameter is that it belongs to, where it has the parameter's shape: it may not
    be there yet. Random streams are each rank's own.
    """
    found = {}
    for name, tensor in stored.items():
        if name.startswith(RANDOM) and name != f"{RANDOM}{rank}":
            continue
        cut = _cut_alike(name, tensor, live.tensors)
        found[name] = box_here(cut, rank) if cut is not None else ((0,) * len(tensor.shape), tensor.shape)
    return found


def rebuilt(live: State, stored: Mapping[str, Tensor], parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts that a rank read, as tensors of the whole run: cut over the ranks where the live ones are."""
    found = {}
    for name, part in parts.items():
        cut = _cut_alike(name, stored[name], live.tensors)
        found[name] = like(cut, part) if cut is not None else part
    return found


def _cut_alike(name: str, stored: Tensor, live: Mapping[str, torch.Tensor]) -> Any:
    """The live DTensor that says how a stored tensor is cut; None where it is not."""
    tensor = live.get(name)
    if tensor is None and name.startswith("optim."):
        parameter, _, _ = name.split(".", 2)[2].rpartition(".")
        tensor = live.get(f"model.{parameter}")
    if tensor is None or not is_cut(tensor) or tuple(tensor.shape) != stored.shape:
        return None
    return tensor


def _optimizer_state(
    index: int,
    optimizer: torch.optim.Optimizer,
    saved: Any,
    tensors: Mapping[str, torch.Tensor],
    named: Mapping[str, nn.Parameter],
    begun: Groups,
) -> tuple[dict[nn.Parameter, dict[str, Any]], list[dict[str, Any]]]:
    """(state by parameter, options by group) for one optimizer, on the devices that it wants them on."""
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise StateError(
            f"optimizer {index} has {len(optimizer.param_groups)} groups, {len(saved['groups'])} were saved"
        )
    names = {id(parameter): name for name, parameter in named.items()}
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        step_on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise StateError(f"optimizer {index} holds a parameter that the model does not have")
            prefix = f"optim.{index}.{name}."
            values: dict[str, Any] = _moved(saved["state"].get(name, {}), parameter.device)
            for key in [key for key in tensors if key.startswith(prefix) and "." not in key[len(prefix) :]]:
                device = parameter.device if key != f"{prefix}step" or step_on_device else torch.device("cpu")
                values[key[len(prefix) :]] = tensors[key].to(device)
            if values:
                state[parameter] = values
    options = [dict(group) for group in saved["groups"]]
    for group, now, then in zip(options, begun, saved.get("begun", ()), strict=False):
        for key in [key for key in group if key in now and key in then and not _alike(now[key], then[key])]:
            del group[key]
    return state, options


def _moved(value: Any, device: torch.device) -> Any:
    """A tree of an optimizer's values, its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return bool(torch.as_tensor(one).cpu().equal(torch.as_tensor(other).cpu()))
    return bool(one == other)


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON with tagged types; its tensors are put into `tensors` under their paths.

    Raises:
        StateError: something in it is neither plain nor a tensor.
    """
    if isinstance(value, torch.Tensor):
        while path in tensors:  # The keys 1 and "1" make one path.
            path += "'"
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is list:
        return [encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = [
            [encode(key, f"{path}.key", tensors), encode(item, f"{path}.{key}", tensors)] for key, item in value.items()
        ]
        return {"dict": pairs}
    raise StateError(
        f"{path}: a {type(value).__name__} cannot be saved; use tensors, numbers, strings, lists and dicts"
    )


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `encode` was given.

    Raises:
        StateError: it was not made by `encode`.
    """
    try:
        return _decode(value, tensors)
    except (RecursionError, TypeError) as error:
        raise StateError(f"state.json holds what no state is made of ({error})") from None


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        if tag == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if tag == "tuple" and isinstance(inner, list):
            return tuple(_decode(item, tensors) for item in inner)
        if tag == "dict" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
            return {_decode(key, tensors): _decode(item, tensors) for key, item in inner}
        if tag == "tensor" and inner in tensors:
            return tensors[inner]
    raise StateError("state.json holds a value of no known type")
