"""A small loop for any launcher; at a step it strikes itself, or runs a shell command that has it stopped.

torchrun --nproc-per-node 2 tests/programs/launched.py --dir FOLDER --strike '7:kill LAUNCHER'
"""

from trainer import SpotRun  # isort: skip

import argparse
import os
import signal
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WAIT_S = 20.0
"""For how long a stopped launcher may take to pass its SIGTERM on."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--until", type=int, default=12)
    parser.add_argument("--group", default="inside", help="where the program makes its group: before or inside")
    parser.add_argument("--strike", default="0:SIGKILL", help="step:signal to rank 0, or step:shell command in rank 0")
    parser.add_argument("--fails", action="store_true", help="rank 1 raises an error in its third step")
    given = parser.parse_args()
    step, name = given.strike.split(":", 1)
    if given.group == "before":
        dist.init_process_group("gloo")
    with SpotRun(given.dir, save_every=3) as run:
        if run.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        torch.manual_seed(0)
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
        items = TensorDataset(x, x.sum(1, keepdim=True))
        model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, 1))
        trained = nn.parallel.DistributedDataParallel(model) if run.world_size > 1 else model
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.02)
        sampler = DistributedSampler(items, run.world_size, run.rank, seed=5)
        run.register(model=trained, optimizer=optimizer)
        torch.manual_seed(run.rank)
        for inputs, targets in run.steps(DataLoader(items, batch_size=4, sampler=sampler), until=given.until):
            if given.fails and run.rank == 1 and run.step == 2:
                raise ValueError("a bug of rank 1")
            if run.step + 1 == int(step) and run.rank == 0:
                if name in signal.Signals.__members__:
                    os.kill(os.getpid(), signal.Signals[name])
                else:
                    # The launcher's signal may end the shell, too, which is in its process group.
                    subprocess.run(["sh", "-c", name.replace("LAUNCHER", str(os.getppid()))], check=False)
                    run.notices.received.wait(WAIT_S)
            loss = (trained(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss)
        run.finish()
    print(f"finished at step {run.step}", flush=True)


if __name__ == "__main__":
    main()
