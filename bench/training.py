"""The bench's training: a model whose parameters and AdamW state have a given size, and timed steps."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import nn

from bench.sizes import layers
from trainer.bucket.hashing import Hasher

BYTES_PER_PARAMETER = 12
"""A parameter and AdamW's two moments, in fp32."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MARGIN = 1.3
"""Calibration aims for this many times the requested duration, because the machine may be faster later."""


def keep_freed_memory() -> None:
    """Have malloc keep freed memory, as PyTorch's GPU allocator does.

    Otherwise each step gets new pages from the system for its activations and gradients. Where the first access to a
    page is slow (on virtual machines a gigabyte may take seconds), that would outweigh everything measured.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.relu(self.linear(x))


def build(state_bytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a model and its AdamW, with about `state_bytes` of state in a few hundred tensors."""
    torch.manual_seed(0)
    parameters = state_bytes // BYTES_PER_PARAMETER
    count = layers(state_bytes)
    width = math.isqrt(max(1, parameters // count - 1))
    outputs = max(1, (parameters - count * (width * width + width)) // (width + 1))
    model = nn.Sequential(*(Residual(width) for _ in range(count)), nn.Linear(width, outputs))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


class Training:
    """A training loop that can be timed."""

    def __init__(self, state_bytes: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.state_bytes = state_bytes
        self.model, self.optimizer = build(state_bytes)
        self.batch = 8

    def forward_backward(self) -> float:
        """Run both passes; returns their seconds."""
        begun = time.perf_counter()
        inputs = torch.ones(self.batch, self.model[0].linear.in_features)  # type: ignore[union-attr,index]
        self.model(inputs).square().mean().backward()
        return time.perf_counter() - begun

    def step(self, before: Callable[[], None] = lambda: None) -> float:
        """Run a step, with `before` between backward and the optimizer; returns the seconds of forward and backward."""
        took = self.forward_backward()
        before()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return took

    def calibrate(self, seconds: float) -> int:
        """Choose the batch so that forward and backward last at least `seconds`."""
        self.step()
        while (took := min(self.step() for _ in range(5))) < MARGIN * seconds:
            self.batch = math.ceil(self.batch * min(4.0, 1.1 * MARGIN * seconds / took))
        return self.batch

    def digest(self) -> str:
        """A hash of all parameters and moments."""
        hasher = Hasher()
        for parameter in self.model.parameters():
            state = self.optimizer.state[parameter]
            for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
                hasher.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return hasher.hexdigest()
