"""A loop that saves with a CheckpointManager; a signal comes at a step, and the loop ends in one of several ways.

python -m trainer.launch tests/programs/managed.py FOLDER --strike 7:SIGTERM --end break
"""

from trainer import CheckpointManager  # isort: skip

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--until", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--strike", default="0:SIGKILL")
    parser.add_argument("--end", default="exit")
    given = parser.parse_args()
    struck, name = given.strike.split(":")
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    manager = CheckpointManager(given.folder, save_every=given.save_every, keep=2)
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    trained = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = manager.load_latest(model=trained, optimizer=optimizer)
    print(f"begins at {step} with {manager.state}", flush=True)
    while step < given.until:
        if given.end == "within" and step + 1 == int(struck):  # Between two micro-steps.
            trained(torch.ones(2, 4)).square().sum().backward()
            os.kill(os.getpid(), getattr(signal, name))
            if manager.interrupted:
                manager.save(step, model=model, optimizer=optimizer)
                manager.exit()
        trained(torch.full((2, 4), float(step % 5))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == int(struck) and rank == ranks - 1:  # One rank alone is told.
            os.kill(os.getpid(), getattr(signal, name))
        manager.state["seen"] = {*manager.state.get("seen", ()), step % 3}
        manager.save(step, model=model, optimizer=optimizer)
        if manager.interrupted:
            if given.end == "exit":
                manager.exit()
            if given.end == "raise":
                raise ValueError("on the way out")
            if given.end == "sys.exit":
                sys.exit(0)
            break
    if step == given.until and rank == 0:
        torch.save(model.state_dict(), given.folder / "model.pt")
    print(f"ends at {step}", flush=True)


if __name__ == "__main__":
    main()
