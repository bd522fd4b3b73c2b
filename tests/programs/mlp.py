"""A small classifier in plain PyTorch that survives the loss of its machine at any moment.

python -m trainer.launch --processes 2 tests/programs/mlp.py --dir runs/mlp --steps 200
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer.config import RunConfig
from trainer.run import SpotRun, default_binding


class Samples:
    """Samples that are a pure function of their number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, ids):
        rows = np.array([np.random.Generator(np.random.PCG64(int(number))).standard_normal(17) for number in ids])
        x = torch.tensor(rows, dtype=torch.float32)[:, :16]
        return {"x": x, "y": (x.sum(1) > 0).long()}

    def weight(self, batch) -> int:
        return len(batch["y"])


class Net(nn.Module):
    """A perceptron with dropout, and a buffer that counts its forward passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.LayerNorm(width),
            nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2),
        )  # fmt: skip
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.body(x)


def loss(model, batch):
    """The sum of the losses of a batch's samples."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True, help="the run's folder, in the mounted bucket")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args()
    config = RunConfig(
        checkpoint_dir=options.dir, max_steps=options.steps, save_interval_steps=options.save_every,
        global_batch_size=12, micro_batch_size=3, seed=7, cpu=True,
    )  # fmt: skip
    binding = {"model": f"mlp-{options.hidden}", "lr": options.lr, **default_binding(config)}
    with SpotRun(config, binding) as run:
        torch.manual_seed(config.seed)
        model = Net(options.hidden)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
        run.train(
            model,
            optimizer,
            samples=Samples(options.samples),
            loss=loss,
            lr_factor=lambda step: 1 - step / (options.steps + 1),
        )


if __name__ == "__main__":
    main()
