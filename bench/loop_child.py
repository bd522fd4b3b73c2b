"""The loop that bench.loop measures, bare or with skyspot, plain or of Hugging Face; a block of steps per request.

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
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bench.training import build, keep_freed_memory
from bench.worker import peak_bytes

FOR_EVER = 1_000_000_000


class Blocks:
    """Answers each request for a block of steps with its seconds."""

    def __init__(self, address: str) -> None:
        self._pipe, self._left, self._begun = Client(address), 0, 0.0

    def step(self) -> bool:
        """Called before each step; waits for a request where a block begins. False: there are no more."""
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
    parser.add_argument("--way", choices=("bare", "steps", "hf-bare", "hf"), required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    model, optimizer = build(given.size)
    data = TensorDataset(torch.randn(1024, model[0].linear.in_features))  # type: ignore[index,union-attr]
    train = with_transformers if given.way.startswith("hf") else plain
    with SpotRun(given.folder) if given.way in ("steps", "hf") else nullcontext() as run:
        train(run, Blocks(given.address), model, optimizer, data, given)


def plain(run: SpotRun | None, blocks: Blocks, model: nn.Module, optimizer: Any, data: Any, given: Any) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = DataLoader(data, batch_size=given.batch, shuffle=True)
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


class WithLoss(nn.Module):
    """As transformers' Trainer wants a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.model(x).square().mean()}


def with_transformers(
    run: SpotRun | None, blocks: Blocks, model: nn.Module, optimizer: Any, data: Any, given: Any
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        is_last = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.is_last = not blocks.step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = self.is_last

    callbacks: list[Any] = [Steps()]
    if run:
        from trainer.hf import SpotCallback

        callbacks.append(SpotCallback(run))
    args = TrainingArguments(
        output_dir=f"{given.folder}-output", max_steps=FOR_EVER, per_device_train_batch_size=given.batch,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=FOR_EVER,
    )  # fmt: skip

    def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for (x,) in rows])}

    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(
        WithLoss(model), args, train_dataset=data, data_collator=collate, callbacks=callbacks,
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=run.resume_from() if run else None)
    if run:
        run.finish(lambda folder: (folder / "done").touch())


if __name__ == "__main__":
    main()
