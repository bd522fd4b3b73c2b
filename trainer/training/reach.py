"""Reach: which parameters a backward pass gives gradients to, read from autograd's graph without running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch


def unreached(outputs: Iterable[torch.Tensor], named: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that a backward pass from these outputs does not reach."""
    found = {id(leaf) for leaf in _leaves(outputs)}
    return [name for name, parameter in named.items() if id(parameter) not in found]


def _leaves(outputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    left = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        variable = getattr(node, "variable", None)  # Only a node that accumulates a gradient has it.
        if variable is not None:
            yield variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)
