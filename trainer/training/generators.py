"""Generators: those with which a loader and its samplers draw the order of an epoch, and their states as tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def held_by(parts: Iterable[object]) -> list[Generator]:
    """The generators that are attributes of these objects, each once; those of torch's called `generator` first.

    Args:
        parts: A loader and its samplers.
    """
    parts = list(parts)
    torchs = [one for part in parts if isinstance(one := getattr(part, "generator", None), torch.Generator)]
    attributes = [one for part in parts for one in getattr(part, "__dict__", {}).values()]
    others = [one for one in attributes if isinstance(one, Generator) and not isinstance(one, random.SystemRandom)]
    return list(dict.fromkeys([*torchs, *others]))


def save(generator: Generator) -> torch.Tensor:
    """The state of a generator as a uint8 tensor: torch's own, or JSON."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    state: Any
    if isinstance(generator, random.Random):
        state = generator.getstate()
    elif isinstance(generator, np.random.RandomState):
        state = generator.get_state(legacy=False)
    else:
        state = generator.bit_generator.state
    text = json.dumps(state, default=lambda array: array.tolist())
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def load(generator: Generator, saved: torch.Tensor) -> None:
    """Restore what `save` returned of a generator of the same kind."""
    if isinstance(generator, torch.Generator):
        generator.set_state(saved)
        return
    state = json.loads(bytes(saved.numpy()))
    if isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
