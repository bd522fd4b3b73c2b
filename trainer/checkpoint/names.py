"""Names of a model's parts that do not depend on wrappers around the model or its parts.

DistributedDataParallel wraps the whole model and adds a component to each name. torch.compile and activation
checkpointing may wrap any submodule, in one attempt and not in the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

COMPILED = "_orig_mod"
"""The attribute in which torch.compile keeps the module that it wraps."""
_WRAPPERS = frozenset({COMPILED, "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """A dotted name without the components that wrappers add."""
    if "._" not in name and not name.startswith("_"):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, which may itself be compiled."""
    inner = model._modules.get(COMPILED) or model
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        return unwrap(inner.module)
    return model


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name; tied parameters once."""
    return {plain_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by name, without their wrappers; the model's own name is empty."""
    return {plain_name(name): module for name, module in unwrap(model).named_modules()}


@contextmanager
def without_compilation(model: nn.Module) -> Iterator[nn.Module]:
    """The user's module without the wrappers of torch.compile around it or its parts; they come back afterwards."""
    bare = unwrap(model)
    while COMPILED in bare._modules:
        bare = bare._modules[COMPILED]  # type: ignore[assignment]
    swapped = []
    for parent in list(bare.modules()):
        for name, child in parent._modules.items():
            if child is not None and COMPILED in child._modules:
                swapped.append((parent, name, child))
    try:
        for parent, name, child in swapped:
            inner: nn.Module | None = child
            while inner is not None and COMPILED in inner._modules:
                inner = inner._modules[COMPILED]
            parent._modules[name] = inner
        yield bare
    finally:
        for parent, name, child in swapped:
            parent._modules[name] = child


def named_tensors(state_dict: dict[str, object]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the tensors of a module's state_dict by name, the names of its other values)."""
    tensors = {plain_name(name): value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    return tensors, [plain_name(name) for name, value in state_dict.items() if not isinstance(value, torch.Tensor)]
