"""Passes: the loss function and the model as one module, whose gradients are averaged over the ranks.

DistributedDataParallel (DDP) wraps both together. So the loss function gets the model itself, with its own methods and
attributes, and whatever it calls of it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.training.reach import unreached

Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class _Held:
    """A batch as DDP passes it on: unchanged."""

    batch: Any


class _LossOfModel(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, held: _Held) -> torch.Tensor:
        return self._loss(self.model, held.batch)


class Passes:
    """Runs the loss function of a model on this rank."""

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device, find_unused: bool | None) -> None:
        """Begin with a module that no other rank knows of.

        Args:
            model: On its device.
            loss: (model, batch) -> the loss.
            device: The model's.
            find_unused: Whether DDP looks in each step for parameters that get no gradient; None: if the first batch
                has one.
        """
        self._device, self._find_unused = device, find_unused
        self._module: nn.Module = _LossOfModel(model, loss)

    def join(self, batch: Any) -> list[str]:
        """Average gradients over the ranks from now on; every rank calls it with the same batch.

        Returns:
            The names of the parameters that made DDP look for those without a gradient.
        """
        named = {name: one for name, one in self._module.named_parameters() if one.requires_grad}
        if not named:
            return []
        unused: list[str] = []
        if self._find_unused is None:
            unused = self._unused(named, batch)
        on_gpu = self._device.type == "cuda"
        self._module = nn.parallel.DistributedDataParallel(
            self._module,
            device_ids=[self._device] if on_gpu else None,
            find_unused_parameters=bool(self._find_unused or unused),
        )
        return [name.removeprefix("model.") for name in unused]

    def _unused(self, named: dict[str, nn.Parameter], batch: Any) -> list[str]:
        loss = self(batch)
        if not loss.requires_grad or not unreached([loss], named):
            return []
        # Reentrant checkpointing hides parameters from the graph: the gradients decide.
        loss.backward()  # type: ignore[no-untyped-call]
        found = [name for name, parameter in named.items() if parameter.grad is None]
        self._module.zero_grad(set_to_none=True)
        return found

    def __call__(self, batch: Any) -> torch.Tensor:
        """The loss of a batch."""
        loss: torch.Tensor = self._module(_Held(batch))
        return loss

    def without_averaging(self) -> AbstractContextManager[None]:
        """A context in which gradients are summed on this rank alone."""
        if isinstance(self._module, nn.parallel.DistributedDataParallel):
            return self._module.no_sync()
        return nullcontext()
