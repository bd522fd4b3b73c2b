"""The state of a training run at a boundary: named tensors, and a small tree of plain values.

Names: `model.<fqn>` for parameters and buffers, `optim.<i>.<fqn>.<name>` for the optimizer's tensors, `module.<fqn>`
for the tensors in a module's extra state, `extra.<path>` for those in a user's extras (the last two with `own.<rank>.`
before them if each rank has its own, extras.py). Wrappers around the program's modules do not change a name. All other
values go into one tree of JSON with tagged types. No value is ever pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpoint import buffers, extra_states, frozen, memory_formats, optimizers
from trainer.checkpoint.contents import Tensor
from trainer.checkpoint.names import parameters, plain_name, unwrap
from trainer.checkpoint.optimizers import Groups, options_of
from trainer.checkpoint.shards import Box, box_here, is_cut, like
from trainer.checkpoint.values import StateError, decode, encode, tensors_of
from trainer.checkpoint.writing import SAVED_DTYPES

__all__ = ["Groups", "State", "StateError", "apply", "collect", "options_of", "rebuilt", "wanted"]

MODEL = "model."
"""The prefix of parameters and buffers."""
RANDOM = "rng."
"""The prefix of the ranks' random streams."""
OWN = "own."
"""The prefix of extras, and of modules' extra state, that each rank has for itself (extras.py)."""


@dataclass(frozen=True)
class State:
    """Everything that a step changes."""

    tensors: dict[str, torch.Tensor]
    """The live tensors by name, sorted; not copies."""
    plain: dict[str, Any]
    """The rest, as tagged JSON (`encode`)."""
    buffers: frozenset[str]
    """Names of the tensors that rank 0 saves for all: the model's buffers, and its modules' extra state."""
    steady: frozenset[str]
    """Names of the tensors that nothing changes before the optimizer's next step: parameters and optimizer state."""
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors of this rank alone, on the host, by names that no other rank has; nothing changes them."""
    files: dict[str, Path] = field(default_factory=dict)
    """Local files of this rank alone, each saved as a tensor of its bytes; by names as of `own`, and nothing changes
    them."""


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers by name, tied ones once; without buffers that are not persistent."""
    return {f"{MODEL}{name}": tensor for name, tensor in {**parameters(model), **buffers.persistent(model)}.items()}


def collect(
    model: nn.Module,
    optims: Sequence[torch.optim.Optimizer],
    counters: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    begun: Sequence[Groups] = (),
    made: buffers.Forms | None = None,
    base: frozen.Frozen | None = None,
) -> State:
    """The state of a run at a boundary.

    Args:
        model: The model, wrapped or not.
        optims: Over its parameters.
        counters: Plain values.
        extra: The user's extras, by name.
        begun: `options_of` each optimizer as the program made it; shows later changes of the program.
        made: `buffers.forms` of the model as the program made it; shows later changes of the program.
        base: The model's frozen parameters, which are left out as long as nothing changes them; None: they are saved.

    Raises:
        StateError: a value is neither a tensor nor plain, or a tensor has a type that cannot be saved, or a part of an
            optimizer's state would be lost; the message names it.
    """
    named = parameters(model)
    tensors: dict[str, torch.Tensor] = model_tensors(model)
    own = frozenset(tensors) - {f"{MODEL}{name}" for name in named}
    groups = []
    for index, optimizer in enumerate(optims):
        of_parameters, rest = optimizers.collect(index, optimizer, named)
        tensors |= of_parameters
        groups.append({**rest, "begun": begun[index]} if begun else rest)
    left_out = base.left_out(named) if base else set[str]()
    for name in left_out:
        del tensors[f"{MODEL}{name}"]
    steady = frozenset(tensors) - own
    rests: dict[str, torch.Tensor] = {}
    optim = encode(groups, "optimizer", rests)
    steady |= rests.keys()  # The rest of an optimizer's state changes with its step too.
    of_modules: dict[str, torch.Tensor] = {}
    modules_own = encode(extra_states.collect(model), "module", of_modules)
    tensors |= rests | of_modules
    plain = {
        "optim": optim,
        "counters": encode(dict(counters), "counters", tensors),
        "extra": encode(dict(extra or {}), "extra", tensors),
        "modules": modules_own,
        "strides": memory_formats.strides_of(tensors),
    }
    if base and left_out:
        plain["frozen"] = base.describe(left_out, named)
    if made is not None:
        plain["buffers"] = buffers.changed(model, made)
    for name, tensor in tensors.items():
        if tensor.dtype not in SAVED_DTYPES:
            raise StateError(f"{name}: {tensor.dtype} cannot be saved")
    return State(dict(sorted(tensors.items())), plain, own | of_modules.keys(), steady)


def apply(
    model: nn.Module,
    optims: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
    plain: Mapping[str, Any],
    begun: Sequence[Groups] = (),
    made: buffers.Forms | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a state into a model and its optimizers; returns (counters, extra).

    Everything is checked before anything is changed. An optimizer's option stays as the program makes it if the program
    that saved the state made it differently (`begun`, as of `collect`); all other options are restored.

    Raises:
        StateError: a tensor is missing or unknown, or has another shape or dtype; the message names it.
    """
    strides = plain.get("strides")
    formatted = isinstance(strides, Mapping)  # Older releases recorded none.
    if isinstance(strides, Mapping):
        tensors = memory_formats.laid_out(tensors, strides)
    named = parameters(model)
    found = {plain_name(name[len(MODEL) :]): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
    _check_parameters(named, found, plain.get("frozen"))
    forms = plain.get("buffers")
    of_buffers = buffers.plan(
        model,
        {name: tensor for name, tensor in found.items() if name not in named},
        forms if isinstance(forms, Mapping) else None,
        made,
    )
    modules_own = extra_states.plan(model, decode(plain.get("modules"), tensors))
    loads = _plan_optimizers(optims, tensors, plain, named, begun, formatted)
    with torch.no_grad():
        for name, parameter in named.items():
            if name not in found:
                continue  # It is frozen, and the same.
            saved = found[name]
            if formatted and _is_laid_out_otherwise(parameter, saved):
                parameter.data = saved.to(parameter.device, copy=True)
            else:
                parameter.copy_(saved)
    buffers.restore(of_buffers, next(iter(named.values())).device if named else torch.device("cpu"))
    for module, value in modules_own:
        module.set_extra_state(value)
    for load in loads:
        load()
    return decode(plain.get("counters"), tensors), decode(plain.get("extra"), tensors)


def _check_parameters(named: Mapping[str, nn.Parameter], found: Mapping[str, torch.Tensor], left_out: Any) -> None:
    frozen.check(named, named.keys() - found.keys(), left_out)
    for name, parameter in named.items():
        saved = found.get(name)
        if saved is not None and (parameter.shape != saved.shape or parameter.dtype != saved.dtype):
            raise StateError(
                f"{MODEL}{name} is {tuple(saved.shape)} {saved.dtype} in the checkpoint, "
                f"{tuple(parameter.shape)} {parameter.dtype} in the model"
            )


def _is_laid_out_otherwise(live: torch.Tensor, saved: torch.Tensor) -> bool:
    return not is_cut(live) and live.stride() != saved.stride() and memory_formats.is_dense(live.shape, live.stride())


def _plan_optimizers(
    optims: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, torch.Tensor],
    plain: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    begun: Sequence[Groups],
    formatted: bool,
) -> list[Callable[[], None]]:
    saved = decode(plain.get("optim"), tensors)
    if not isinstance(saved, list) or len(saved) != len(optims):
        raise StateError(f"the checkpoint was saved with another number of optimizers (here: {len(optims)})")
    by_parameter = optimizers.by_parameter(tensors, named, tensors_of(plain.get("optim")))
    try:
        return [
            optimizers.plan(
                index, optimizer, one, by_parameter.get(str(index), {}), named, begun[index] if begun else [], formatted
            )
            for index, (optimizer, one) in enumerate(zip(optims, saved, strict=True))
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StateError(f"state.json holds no state of an optimizer ({type(error).__name__}: {error})") from error


def not_seen(model: nn.Module) -> list[str]:
    """Names in a model's state_dict that its state leaves out: neither parameters nor buffers.

    A tensor that only has another name there is no loss; `get_extra_state` is saved apart.
    """
    try:
        in_state_dict = unwrap(model).state_dict()
    except Exception:  # The user's own call of it will fail too.
        return []
    known = {tensor.data_ptr() for tensor in model_tensors(model).values() if not is_cut(tensor)}
    return [
        plain_name(name)
        for name, value in in_state_dict.items()
        if not name.endswith("_extra_state")
        and not (isinstance(value, torch.Tensor) and (is_cut(value) or not value.numel() or value.data_ptr() in known))
    ]


# -- cut over the ranks ------------------------------------------------------------------------------------------------


def wanted(live: State, stored: Mapping[str, Tensor], rank: int) -> dict[str, Box]:
    """The boxes that a rank needs: its own part of a tensor that is cut over the ranks, all of any other tensor.

    An optimizer's tensor is cut like its parameter if it has the parameter's shape: the live one may not exist yet.
    Each rank has its own random streams.
    """
    found = {}
    for name, tensor in stored.items():
        if name.startswith(RANDOM) and name != f"{RANDOM}{rank}":
            continue
        # The first rank's extras too: if the number of ranks changed, all ranks resume with them.
        if name.startswith(OWN) and name.split(".")[1] not in ("0", str(rank)):
            continue
        cut = _cut_alike(name, tensor, live.tensors)
        found[name] = box_here(cut, rank) if cut is not None else ((0,) * len(tensor.shape), tensor.shape)
    return found


def rebuilt(live: State, stored: Mapping[str, Tensor], parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts that a rank read, as tensors of the whole run: cut over the ranks if the live ones are."""
    found = {}
    for name, part in parts.items():
        cut = _cut_alike(name, stored[name], live.tensors)
        found[name] = like(cut, part) if cut is not None else part
    return found


def _cut_alike(name: str, stored: Tensor, live: Mapping[str, torch.Tensor]) -> Any:
    """The live DTensor that is cut as a stored tensor is to be; None if that is not cut."""
    name = plain_name(name)
    tensor = live.get(name)
    if tensor is None and name.startswith(optimizers.PREFIX):
        parameter, _, _ = name.split(".", 2)[2].rpartition(".")
        tensor = live.get(f"{MODEL}{parameter}")
    if tensor is None or not is_cut(tensor) or tuple(tensor.shape) != stored.shape:
        return None
    return tensor
