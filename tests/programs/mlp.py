"""A small classifier in plain PyTorch that survives the loss of its machine at any moment.

python -m trainer.launch --processes 2 tests/programs/mlp.py --dir runs/mlp --steps 200
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from trainer import RunConfig, SpotRun


class Samples:
    """Random points, and on which side of a plane each of them lies."""

    def __init__(self, count: int = 4000) -> None:
        self.x = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, ids):
        return {"x": self.x[ids], "y": self.y[ids]}

    def weight(self, batch) -> int:
        return len(batch["y"])


def make_model(width: int = 32) -> nn.Module:
    hidden = [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.2), *hidden, nn.Linear(width, 2))


def loss(model, batch):
    """The sum of the losses of a batch's samples."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True, help="the run's folder, in the mounted bucket")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=4)
    given = parser.parse_args()
    config = RunConfig(checkpoint_dir=given.dir, max_steps=given.steps, save_interval_steps=given.save_every,
                       global_batch_size=12, micro_batch_size=3, seed=7, cpu=True)  # fmt: skip
    with SpotRun(config) as run:
        torch.manual_seed(config.seed)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run.train(model, optimizer, samples=Samples(), loss=loss, lr_factor=lambda step: 1 - step / (given.steps + 1))


if __name__ == "__main__":
    main()
