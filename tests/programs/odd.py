"""Odd things at once: sparse gradients, float weights, a sample that is NaN, extras that each rank has for itself.

python -m trainer.launch --processes 2 tests/programs/odd.py --dir RUN [--fail MESSAGE]
"""

import argparse
import math
import time
from pathlib import Path

from trainer import RunConfig, SpotRun

import numpy as np  # isort: skip
import torch  # isort: skip
from torch import nn  # isort: skip

STEPS = 12
OPTIONS = {"global_batch_size": 5, "micro_batch_size": 1, "save_interval_steps": 4, "on_nan": "skip", "cpu": True}


class Rows:
    """Samples whose weight is no whole number; the 13th is none."""

    def __len__(self) -> int:
        return 30

    def batch(self, ids: np.ndarray) -> torch.Tensor:
        rows = [np.random.Generator(np.random.PCG64(int(number))).standard_normal(5) for number in ids]
        table = torch.tensor(np.array(rows), dtype=torch.float32)
        return table * math.nan if 13 in ids else table

    def weight(self, batch: torch.Tensor) -> float:
        return 0.3 if bool(batch[0, 0] > 0) else 0.7


class Bag(nn.Module):
    """A model most of whose weights have sparse gradients."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, sparse=sparse)
        self.out = nn.Linear(4, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.out(self.table((batch[:, :4].nan_to_num() * 10).long().clamp(-25, 24) + 25).mean(1))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch).squeeze(1) - batch[:, 4]).square().sum()


class Tally:
    """Counts the updates, on each rank in steps of its own; and one tensor that all ranks share."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        self.table, self.shared = torch.zeros(3), torch.zeros(3)

    def add(self, *_: object) -> None:
        self.count += self.rank + 1
        self.table += self.rank + 1
        self.shared += 1

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count, "table": self.table, "shared": self.shared}

    def load_state_dict(self, saved: dict[str, object]) -> None:
        self.count, self.table, self.shared = saved["count"], saved["table"].clone(), saved["shared"].clone()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--fail", default="", help="what the last rank says at step 6 when it raises a RuntimeError")
    options = parser.parse_args()
    with SpotRun(RunConfig(checkpoint_dir=options.dir, max_steps=STEPS, **OPTIONS)) as run:
        said = [run.rank0_does("count", lambda number=number: number) for number in range(3)]
        print(f"rank {run.rank} heard {said}", flush=True)

        def loss_or_fail(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            if options.fail and run.steps_done == 6 and run.rank == run.world_size - 1:
                while not any(options.dir.glob("checkpoints/*/MANIFEST.json")):
                    time.sleep(0.01)
                raise RuntimeError(options.fail)
            return loss(model, batch)

        torch.manual_seed(0)
        model = Bag()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        tally = Tally(run.rank)
        optimizer.register_step_post_hook(tally.add)

        def lr_factor(step: int) -> float:
            if step == STEPS:
                print(f"rank {run.rank} had {tally.count} {tally.table.tolist()} {tally.shared.tolist()}", flush=True)
            return 1.0

        run.train(model, optimizer, samples=Rows(), loss=loss_or_fail, lr_factor=lr_factor, extra={"tally": tally})


if __name__ == "__main__":
    main()
