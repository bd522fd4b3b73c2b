"""A loop that is told to stop in a step, and notes what is imported from then on: `stop_imports.py DIR NOTE`."""

import atexit
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer import SpotRun

NOTE = Path(sys.argv[2])


class Late:
    """Finds no module; notes which were looked for."""

    def find_spec(self, name: str, *_: object) -> None:
        with NOTE.open("a") as file:
            file.write(f"{name}\n")


with SpotRun(sys.argv[1], save_every=100) as run:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    run.register(model=model, optimizer=optimizer)
    for batch in run.steps(DataLoader(torch.randn(9, 1)), until=6):
        model(batch).sum().backward()
        optimizer.step()
        if run.step == 2:
            late: Any = Late()
            sys.meta_path.insert(0, late)
            atexit.register(sys.meta_path.remove, late)  # What torch loads as Python ends comes after the stop.
            NOTE.touch()
            print("now", flush=True)
            assert run.notices.received.wait(60)
    run.finish()
