"""The loop that bench.loop measures: bare or under run.steps; a block of steps per request.

python -m trainer.launch bench/loop_child.py --way steps --address SOCKET ...
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer import SpotRun  # isort: skip

import torch
from torch.utils.data import DataLoader, TensorDataset

from bench.training import build, keep_freed_memory
from bench.worker import peak_bytes

FOR_EVER = 1_000_000_000


class Blocks:
    """Answers each request for a block of steps with its seconds."""

    def __init__(self, address: str) -> None:
        self._pipe, self._left, self._begun = Client(address), 0, 0.0

    def step(self) -> bool:
        """Called between two steps; waits for a request after each block. False: there are no more."""
        if self._left == 0:
            if self._begun:
                self._pipe.send((time.perf_counter() - self._begun, peak_bytes()))
            self._left = self._pipe.recv()
            self._begun = time.perf_counter()
        self._left -= 1
        return self._left >= 0


def epochs(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=("bare", "steps"), required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    model, optimizer = build(given.size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    width = model[0].linear.in_features  # type: ignore[index,union-attr]
    loader = DataLoader(TensorDataset(torch.randn(1024, width)), batch_size=given.batch, shuffle=True)
    blocks = Blocks(given.address)
    with SpotRun(given.folder) if given.way == "steps" else nullcontext() as run:
        if run:
            run.register(model=model, optimizer=optimizer, scheduler=scheduler)
        for (x,) in run.steps(loader, until=FOR_EVER) if run else epochs(loader):
            if not blocks.step():
                break
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if run:
                run.log(loss=loss)
        if run:
            run.finish(lambda folder: (folder / "done").touch())


if __name__ == "__main__":
    main()
