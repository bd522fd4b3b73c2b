"""mlp.py with a micro-batch of `auto`, on a machine whose memory holds only so many samples from some step on.

python -m trainer.launch --processes 2 tests/programs/small_memory.py --dir RUN --fits 2 --rank 1 --place backward

Memory runs out in the forward pass, in the backward pass before a gradient is there, in the middle of it, or in the
optimizer's step, once it has changed a parameter.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

import torch
from mlp import Samples, make_model
from mlp import loss as plain_loss
from torch import nn

from trainer import RunConfig, SpotRun
from trainer.training.training_state import TrainingState


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. (planted)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--micro", default="auto")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--fits", type=int, default=99)
    parser.add_argument("--since", type=int, default=0, help="the step from which on memory is small")
    parser.add_argument("--rank", type=int, default=0, help="the rank that has little memory")
    parser.add_argument("--place", choices=["forward", "backward", "middle", "update"], default="forward")
    parser.add_argument("--device", default="cpu", help="the device's name")
    given = parser.parse_args()
    TrainingState.device_name = property(lambda self: given.device)
    micro = given.micro if given.micro == "auto" else int(given.micro)
    config = RunConfig(checkpoint_dir=given.dir, max_steps=given.steps, save_interval_steps=4, global_batch_size=12,
                       micro_batch_size=micro, cpu=True, allow_config_change=("max_steps",))  # fmt: skip

    passes: Counter[int] = Counter()
    sizes: list[int] = []

    def is_too_large(size):
        return size > given.fits and run.step >= given.since and run.rank == given.rank

    class Optimizer(torch.optim.AdamW):
        def step(self, closure=None):
            if given.place == "update" and is_too_large(sizes[-1]):
                self.param_groups[0]["params"][0].data.zero_()
                raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
            return super().step(closure)

    def loss(model, batch):
        passes[run.step] += 1
        sizes.append(len(batch["y"]))
        runs_out = is_too_large(sizes[-1]) and given.place != "update"
        if given.since and passes[run.step] == 1:
            runs_out = False  # The gradients of a step's first micro-step are there already.
        if runs_out and given.place == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        if runs_out and given.place == "middle":
            hidden = _Fails.apply(model[:3](batch["x"]))
            return nn.functional.cross_entropy(model[3:](hidden), batch["y"], reduction="sum")
        found = plain_loss(model, batch)
        return _Fails.apply(found) if runs_out else found

    with SpotRun(config) as run:
        torch.manual_seed(0)
        model = make_model(given.hidden)
        run.train(model, Optimizer(model.parameters(), lr=0.01), samples=Samples(60), loss=loss)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
