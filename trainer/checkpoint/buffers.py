"""A model's buffers: those that are saved, and how they are restored if their form changes during training.

A buffer may grow (a memory of samples), appear (a mask made by the first forward pass) or vanish (a cache that is
dropped). Buffers that are not persistent are no part of a state: the program makes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.names import modules
from trainer.checkpoint.values import StateError

Forms = dict[str, Any]
"""By name the [type, shape] of a buffer; None if its place is empty."""
Kept = dict[str, torch.Tensor | None]


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every place for a buffer, filled or not: (its name, its module, its name there)."""
    for prefix, module in modules(model).items():
        for key in module._buffers:
            yield f"{prefix}.{key}" if prefix else key, module, key


def persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are saved, by name; a buffer that several modules share appears once."""
    found, seen = {}, set[int]()
    for name, module, key in _places(model):
        tensor = module._buffers[key]
        if tensor is not None and key not in module._non_persistent_buffers_set and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def not_persistent(model: nn.Module) -> set[str]:
    """Names of the buffers that the program makes anew."""
    return {name for name, module, key in _places(model) if key in module._non_persistent_buffers_set}


def forms(model: nn.Module) -> Forms:
    """The form of every persistent buffer, filled or not."""
    return {
        name: form(module._buffers[key])
        for name, module, key in _places(model)
        if key not in module._non_persistent_buffers_set
    }


def form(tensor: torch.Tensor | None) -> Any:
    """A buffer's type and shape."""
    return None if tensor is None else [str(tensor.dtype), list(tensor.shape)]


def changed(model: nn.Module, made: Forms) -> Forms:
    """The original forms of the buffers whose form has changed since the program made them."""
    now = forms(model)
    return {name: made.get(name) for name in sorted(now.keys() | made.keys()) if now.get(name) != made.get(name)}


# -- set aside and put back --------------------------------------------------------------------------------------------


def keep(model: nn.Module) -> Kept:
    """A copy of all buffers."""
    copies: dict[int, torch.Tensor] = {}
    found: Kept = {}
    for name, module, key in _places(model):
        tensor = module._buffers[key]
        if tensor is not None and id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        found[name] = None if tensor is None else copies[id(tensor)]
    return found


def put_back(model: nn.Module, kept: Kept) -> None:
    """Restore the kept buffers. A buffer registered since stays, because its module may rely on it."""
    by_name = modules(model) if kept else {}  # Empty after nearly each micro-step.
    for name, tensor in kept.items():
        path, _, key = name.rpartition(".")
        if path in by_name:
            assign(by_name[path], key, tensor)


def assign(module: nn.Module, key: str, value: torch.Tensor | None) -> None:
    """Set a buffer to a value; in place if possible, so that other holders of the tensor see it."""
    live = module._buffers.get(key)
    if value is None or live is None:
        module._buffers[key] = None if value is None else value.clone()
        return
    with torch.no_grad():
        if form(live) == form(value) and not _overlaps(live) and live.stride() == value.stride():
            live.copy_(value)
            return
        with suppress(RuntimeError):  # A tensor whose form is fixed is replaced by another one.
            live.data = value.to(live.device, copy=True)
            return
        module._buffers[key] = value.to(live.device, copy=True)


def _overlaps(tensor: torch.Tensor) -> bool:
    """True if elements share a place in memory, as after expand()."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def not_kept(before: Kept, after: Kept, model: nn.Module) -> list[str]:
    """Names of the buffers that are not saved although training changes them like state."""
    found = []
    for name in sorted(not_persistent(model)):
        then, now = before.get(name), after.get(name)
        if then is not None and now is not None and form(then) == form(now) and not _same(then, now):
            found.append(name)
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN equals NaN here.


# -- restored ----------------------------------------------------------------------------------------------------------


def plan(
    model: nn.Module, saved: Mapping[str, torch.Tensor], then: Any, made: Forms | None
) -> list[tuple[nn.Module, str, torch.Tensor | None]]:
    """The assignments (module, name, value) that restore the saved buffers; nothing changes yet.

    Args:
        model: The model, with the buffers that the program made.
        saved: The saved buffers by name.
        then: The original forms of the buffers whose form had changed when they were saved; None if that was not
            recorded.
        made: The forms in which the program makes the buffers now; None: their present forms.

    Raises:
        StateError: a buffer is missing or unknown, or has a form that training cannot have given it.
    """
    places = {name: (module, key) for name, module, key in _places(model)}
    fresh, live = not_persistent(model), persistent(model)
    made = forms(model) if made is None else made
    found: list[tuple[nn.Module, str, torch.Tensor | None]] = []

    def grew(name: str) -> bool:
        """True if the program made it as it does now, and training changed its form."""
        return then is None or (name in then and then[name] == made.get(name))

    for name, tensor in saved.items():
        if name in fresh:
            continue  # An older release saved them.
        if name in places:
            module, key = places[name]
            now = module._buffers[key]
            if form(now) != form(tensor) and not grew(name):
                there = "empty" if now is None else f"{tuple(now.shape)} {now.dtype}"
                raise StateError(
                    f"model.{name} is {tuple(tensor.shape)} {tensor.dtype} in the checkpoint, {there} in the model"
                )
        else:
            module, key = _new_place(model, name, then)
        found.append((module, key, tensor))
    for name in sorted(live.keys() - saved.keys()):
        if then is None or name not in then or not grew(name):
            raise StateError(f"model.{name} is not in the checkpoint")
        found.append((*places[name], None))
    return found


def _new_place(model: nn.Module, name: str, then: Any) -> tuple[nn.Module, str]:
    """The place of a buffer that a module registers only while it trains."""
    path, _, key = name.rpartition(".")
    module = modules(model).get(path)
    if not then or name not in then or then[name] is not None or module is None or hasattr(module, key):
        raise StateError(f"model.{name} is not in the model")
    return module, key


def restore(assignments: list[tuple[nn.Module, str, torch.Tensor | None]], device: torch.device) -> None:
    """Make the planned assignments."""
    for module, key, tensor in assignments:
        if key not in module._buffers:
            module.register_buffer(key, None)
        assign(module, key, tensor if tensor is None or module._buffers[key] is not None else tensor.to(device))
