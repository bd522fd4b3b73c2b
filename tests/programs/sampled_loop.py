"""A loop of somebody's own that takes its order from run.sampler(); its items and its model draw random numbers.

python -m trainer.launch tests/programs/sampled_loop.py --dir FOLDER --until 9 --workers 2 --strike 5
"""

from trainer import SpotRun  # isort: skip

import argparse
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Items(Dataset):
    """Points with noise that is drawn anew for each."""

    def __init__(self) -> None:
        self.x = torch.randn(22, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index] + 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand())


def everywhere(value: torch.Tensor, ranks: int) -> float:
    """The sum over all ranks."""
    total = value.detach().double()
    if ranks > 1:
        dist.all_reduce(total)
    return total.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--until", type=int, default=9)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--strike", type=int, default=0, help="SIGTERM to the whole process group in this step")
    given = parser.parse_args()
    with SpotRun(given.dir, save_every=3) as run:
        if run.world_size > 1:
            dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        trained = nn.parallel.DistributedDataParallel(model) if run.world_size > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.register(model=trained, optimizer=optimizer)
        items = Items()
        sampler = run.sampler(items, global_batch_size=given.global_batch_size, micro_batch_size=2)
        loader = DataLoader(items, batch_sampler=sampler, num_workers=given.workers)
        total, drawn = torch.zeros(()), torch.zeros(())
        for x in run.steps(loader, until=given.until):
            with run.seeded():
                loss = trained(x).square().mean() / sampler.accumulate
            loss.backward()
            total, drawn = total + loss.detach(), drawn + (x * 2**20).round().double().sum()
            if run.ends_step:
                if run.step + 1 == given.strike:
                    os.killpg(os.getpgrp(), signal.SIGTERM)
                optimizer.step()
                optimizer.zero_grad()
                mean = everywhere(total, run.world_size) / run.world_size
                run.log(loss=mean, drawn=everywhere(drawn, run.world_size))
                total, drawn = torch.zeros(()), torch.zeros(())
        run.finish()


if __name__ == "__main__":
    main()
