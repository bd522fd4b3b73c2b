"""A training of `SpotRun.train` that ends early, has a scheduler of its own, and does something after it.

python -m trainer.launch --processes 2 tests/programs/early.py --dir RUN --enough-at 7 --strike 5:SIGTERM
"""

from trainer import RunConfig, SpotRun  # isort: skip

import argparse
import atexit
import os
import signal
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

Pair = namedtuple("Pair", "x y")
POOLS: list[ProcessPoolExecutor] = []
"""Kept to the end: Python's own exit may find the pipe of a pool closed that is collected just then, and say so."""


class Rows:
    """Points in a line, as named tuples."""

    def __len__(self) -> int:
        return 40

    def batch(self, ids: np.ndarray) -> Pair:
        x = torch.linspace(-1, 1, 40)[ids].reshape(-1, 1)
        return Pair(x, 3 * x)

    def weight(self, batch: Pair) -> int:
        return len(batch.x)


class Early:
    """Ends training when a counter is at its limit; an extra."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", required=True)
    parser.add_argument("--until", type=int, default=20)
    parser.add_argument("--enough-at", type=int, default=0)
    parser.add_argument("--ender", type=int, default=0, help="the rank that ends training")
    parser.add_argument("--strike", default="0:SIGKILL")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--dies-after", action="store_true", help="killed after training, before the block's end")
    given = parser.parse_args()
    at, name = given.strike.split(":")
    config = RunConfig(checkpoint_dir=given.dir, max_steps=given.until, save_interval_steps=3, global_batch_size=4,
                       micro_batch_size=2, cpu=True)  # fmt: skip
    log = Path(f"{given.dir}-log-{os.environ['RANK']}").open("a")  # noqa: SIM115 - open at the end
    atexit.register(print, "at exit", flush=True)
    pool = ProcessPoolExecutor(1)
    POOLS.append(pool)
    print(f"pool {pool.submit(os.getpid).result()}.", flush=True)
    with SpotRun(config) as run:
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        early = Early(given.enough_at)

        def after(*_: object) -> None:
            scheduler.step()
            early.count += 1
            log.write(f"{early.count}\n")
            if run.rank == given.ender and early.count == early.limit:
                run.finish()

        optimizer.register_step_post_hook(after)

        def loss(model: nn.Module, batch: Pair) -> torch.Tensor:
            if run.steps_done + 1 == int(at) and run.rank == 0 and torch.is_grad_enabled() and early.count:
                os.kill(os.getpid(), signal.Signals[name])
            return (model(batch.x) - batch.y).square().sum()

        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # Nobody steps it.
        extra = {"scheduler": scheduler, "plateau": plateau, "early": early}
        options = {"samples": Rows(), "loss": loss, "extra": extra}
        run.train(model, optimizer, **options)
        if given.dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        print(f"uploaded at {run.steps_done}", flush=True)
        if given.twice:
            run.train(model, optimizer, **options)
    print("after the block", flush=True)


if __name__ == "__main__":
    main()
