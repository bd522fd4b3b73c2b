"""Reach: which parameters a backward pass gives gradients to, read from autograd's graph without running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def unreached(outputs: Iterable[torch.Tensor], named: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that a backward pass from these outputs does not reach."""
    variables = (getattr(node, "variable", None) for node in _nodes(outputs))  # Of those that accumulate a gradient.
    found = {id(leaf) for leaf in variables if leaf is not None}
    return [name for name, parameter in named.items() if id(parameter) not in found]


def has_reentrant_checkpoint(outputs: Iterable[torch.Tensor]) -> bool:
    """True if the backward pass computes a part of the forward pass again, with a backward pass of its own.

    That is `torch.utils.checkpoint` with `use_reentrant=True`; its backward pass refuses `inputs`.
    """
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in _nodes(outputs))


def _nodes(outputs: Iterable[torch.Tensor]) -> Iterator[Any]:
    """Each node of the graph once."""
    left = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)
