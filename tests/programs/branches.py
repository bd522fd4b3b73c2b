"""A model with a parameter that nothing uses, and with branches; its loss function calls a method of the model's own.

python -m trainer.launch --processes 2 tests/programs/branches.py --dir RUN [--find no]
"""

import argparse
from pathlib import Path

from trainer import RunConfig, SpotRun

import numpy as np  # isort: skip
import torch  # isort: skip
from torch import nn  # isort: skip

OPTIONS = {"global_batch_size": 6, "micro_batch_size": 1, "save_interval_steps": 4, "max_steps": 12, "cpu": True}


class Rows:
    """Rows of four numbers and a target; the first decides on the branch."""

    def __len__(self) -> int:
        return 40

    def batch(self, ids: np.ndarray) -> torch.Tensor:
        rows = [np.random.Generator(np.random.PCG64(int(number))).standard_normal(5) for number in ids]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def weight(self, batch: torch.Tensor) -> int:
        return len(batch)


class Branches(nn.Module):
    """Micro-steps of one step, and the ranks, take different branches."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.nowhere = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(2, 2)

    def score(self, batch: torch.Tensor) -> torch.Tensor:
        branch = self.left if batch[0, 0] > 0.8 else self.right
        return branch(batch[:, 1:4]).squeeze(1)


def loss(model: Branches, batch: torch.Tensor) -> torch.Tensor:
    return (model.factor * model.score(batch) - batch[:, 4]).square().sum()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--find", choices=["yes", "no"])
    given = parser.parse_args()
    with SpotRun(RunConfig(checkpoint_dir=given.dir, **OPTIONS)) as run:
        torch.manual_seed(0)
        model = Branches()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        find = {"find_unused_parameters": given.find == "yes"} if given.find else {}
        run.train(model, optimizer, samples=Rows(), loss=loss, **find)


if __name__ == "__main__":
    main()
