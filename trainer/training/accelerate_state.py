"""What accelerate decides in a loop of the user's own, and what it needs; without importing it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

from trainer.errors import RunError


def plain_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The user's optimizer inside accelerate's wrapper, which has neither hooks nor a state of its own."""
    inner = getattr(optimizer, "optimizer", None)
    if type(optimizer).__module__.startswith("accelerate.") and isinstance(inner, torch.optim.Optimizer):
        return inner
    return optimizer


def scaler_of(optimizer: torch.optim.Optimizer) -> Any:
    """The gradient scaler in accelerate's wrapper of an optimizer; None if there is none."""
    return None if plain_optimizer(optimizer) is optimizer else getattr(optimizer, "scaler", None)


def refuse_lost_scaler(scalers: Iterable[tuple[str, Any]], others: Iterable[Any]) -> None:
    """Refuse to train on with a loss scale that no checkpoint holds.

    Args:
        scalers: The names of accelerate's optimizers, and their gradient scalers.
        others: The registered objects that are neither modules nor optimizers.

    Raises:
        RunError: a scaler is not registered.
    """
    known = list(others)
    for name, scaler in scalers:
        if not any(scaler is thing for thing in known):
            raise RunError(
                f"register({name}=...): its gradient scaler would be lost. Register it too: "
                "run.register(scaler=accelerator.scaler)"
            )


def refuse_other_processes(world_size: int) -> None:
    """Refuse an `Accelerator` that does not know of the other ranks: each would train alone.

    Raises:
        RunError: it counts another number of processes.
    """
    state = _state("PartialState")
    if state is not None and state.num_processes != world_size:
        raise RunError(
            f"there are {world_size} processes, but Accelerator counts {state.num_processes}. Without a GPU it needs "
            "Accelerator(cpu=True), or the environment variable ACCELERATE_USE_CPU=true"
        )


def ends_step() -> bool:
    """True unless `accelerator.accumulate()` says that more batches belong to the step."""
    state = _state("GradientState")
    return state is None or bool(state.sync_gradients)


def accumulates() -> int:
    """The `gradient_accumulation_steps` of the program's `Accelerator`; 1 without one."""
    state = _state("GradientState")
    return 1 if state is None else int(state.num_steps)


def _state(name: str) -> Any:
    """One of accelerate's shared states; None where the program uses no `Accelerator`."""
    module = sys.modules.get("accelerate.state")
    kind = getattr(module, name, None)
    return kind() if kind is not None and kind._shared_state else None
