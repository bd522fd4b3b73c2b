"""What the bench trains: a model whose parameters and AdamW state have a given size, and the clock around its steps."""

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
"""How much longer than asked for forward and backward last when calibrated: later may be a quieter moment."""


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, as PyTorch's allocator for a GPU does.

    Otherwise each step asks the system for its activations and gradients anew, and where a first touch is slow (on
    virtual machines a gigabyte may take seconds) that drowns all that is measured.
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
    """A model and its AdamW, with about so many bytes of state in some hundred tensors."""
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
        """Seconds that it took."""
        begun = time.perf_counter()
        inputs = torch.ones(self.batch, self.model[0].linear.in_features)  # type: ignore[union-attr,index]
        self.model(inputs).square().mean().backward()
        return time.perf_counter() - begun

    def step(self, before: Callable[[], None] = lambda: None) -> float:
        """One step; `before` is called between the backward pass and the optimizer. Seconds of forward and backward."""
        took = self.forward_backward()
        before()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return took

    def calibrate(self, seconds: float) -> int:
        """Choose the batch so that forward and backward last at least so long."""
        self.step()
        while (took := min(self.step() for _ in range(5))) < MARGIN * seconds:
            self.batch = math.ceil(self.batch * min(4.0, 1.1 * MARGIN * seconds / took))
        return self.batch

    def digest(self) -> str:
        """The same for the same parameters and moments."""
        hasher = Hasher()
        for parameter in self.model.parameters():
            state = self.optimizer.state[parameter]
            for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
                hasher.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        return hasher.hexdigest()
