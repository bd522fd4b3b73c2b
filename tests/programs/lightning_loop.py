"""A LightningModule of somebody's own, in the ways that people write one; it strikes itself at a step.

python -m trainer.launch tests/programs/lightning_loop.py --dir FOLDER --epochs 4 --kind shuffle --strike 7:SIGKILL
"""

from trainer import SpotRun  # isort: skip

import argparse
import json
import os
import random
from contextlib import nullcontext
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import SingleDeviceStrategy
from no_time import no_time
from own_loop import Items, Stream, strike
from torch import nn
from torch.utils.data import DataLoader

from trainer.lightning import SpotCallback
from trainer.training import journal

CALLS: list[str] = []
"""What the hooks of this attempt were called for, in order."""
MEANS: dict[int, float] = {}
"""For each epoch that ended in this attempt, the mean of a metric as Lightning computes it."""


class Module(lightning.LightningModule):
    """Two optimizers if `by_hand`; a schedule for each step, and one that follows the validation."""

    def __init__(self, given: argparse.Namespace, run: SpotRun) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, 1))
        self.critic = nn.Linear(1, 1)
        self.automatic_optimization = given.kind != "by-hand"
        at, self.strike = given.strike.split(":")
        self.strike_at, self.in_validation = int(at.removeprefix("v")), at.startswith("v")
        self.given, self.run, self.is_struck, self.seen = given, run, run.rank == 0, 0.0

    def training_step(self, batch, index):
        if self.global_step + 1 == self.strike_at and self.is_struck and not self.in_validation:
            strike(self.run, self.strike)
        loss = (self.net(batch.x) - batch.y).square().mean()
        self.seen += 1.0
        self.log("train_loss", loss)
        if self.automatic_optimization:
            loss = loss + 0.1 * self.critic(loss.detach().reshape(1, 1)).square().mean()
            self.log("mean_loss", loss, on_step=False, on_epoch=True, batch_size=1)
            return loss
        first, second = self.optimizers()
        judged = self.critic(loss.detach().reshape(1, 1)).square().mean()
        for optimizer, value in ((first, loss), (second, judged)):
            optimizer.zero_grad()
            self.manual_backward(value)
            optimizer.step()
        return loss.detach()

    def validation_step(self, batch, index):
        if self.global_step == self.strike_at and self.is_struck and self.in_validation and index == 0:
            strike(self.run, self.strike)
        self.log("val_loss", (self.net(batch.x) - batch.y).square().mean())

    def on_train_epoch_start(self):
        CALLS.append(f"epoch {self.current_epoch} starts at {self.global_step}")

    def on_train_epoch_end(self):
        MEANS[self.current_epoch] = float(self.trainer.callback_metrics.get("mean_loss", 0.0))

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            CALLS.append(f"validated at {self.global_step}")

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["seen"]

    def configure_optimizers(self):
        if self.given.kind == "by-hand":
            first = torch.optim.AdamW(self.net.parameters(), lr=0.02)
            return [first, torch.optim.SGD(self.critic.parameters(), lr=0.01, momentum=0.9)]
        if self.given.estimated:  # It makes Lightning prepare the loader before anything is restored.
            assert self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        if self.given.kind == "plateau":
            plateaus = [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7) for _ in range(2)]
            every_fifth = {"scheduler": plateaus[0], "interval": "step", "frequency": 5, "monitor": "val_loss"}
            return [optimizer], [every_fifth, {"scheduler": plateaus[1], "monitor": "val_loss"}]
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.9, threshold=0.3)
        every = {"scheduler": plateau, "interval": "step", "frequency": 2, "monitor": "val_loss", "strict": False}
        return [optimizer], [{"scheduler": cosine, "interval": "step"}, every]


class Average(lightning.Callback):
    """Validates with averaged weights, through `.data`, and puts the others back."""

    def on_validation_start(self, trainer, module):
        self.kept = [parameter.detach().clone() for parameter in module.parameters()]
        for parameter in module.parameters():
            parameter.data.mul_(0.9)

    def on_validation_end(self, trainer, module):
        for parameter, kept in zip(module.parameters(), self.kept, strict=True):
            parameter.data.copy_(kept)


def make_loader(given: argparse.Namespace):
    items = Items(given.count, noise=given.kind == "noise")
    if given.kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(items, batch_size=4, shuffle=True), items
    if given.kind == "stream":
        return DataLoader(Stream(items), batch_size=4), items
    workers = 2 if given.kind == "workers" else 0
    more = {"num_workers": workers, "persistent_workers": workers > 0}
    return DataLoader(items, batch_size=4, shuffle=True, **more), items


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--kind", default="shuffle")
    parser.add_argument("--estimated", action="store_true", help="ask for the number of steps before the restore")
    parser.add_argument("--count", type=int, default=18)
    parser.add_argument("--validate", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--patience", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="of the Trainer")
    parser.add_argument("--fit", type=json.loads, default={}, help="options of fit()")
    parser.add_argument("--strike", default="0:SIGKILL", help="7:SIGTERM, 7:limit, or v7:SIGTERM: in a validation")
    parser.add_argument("--report-to", default=(), help="an experiment tracker")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of this attempt")
    parser.add_argument("--no-time", action="store_true", help="a stop never leaves time for the rest of a step")
    given = parser.parse_args()
    os.environ.update(one.split("=", 1) for one in given.env)
    if given.strike.endswith(":limit"):
        journal.LOOK_S = 0.1
    spot_run = SpotRun(given.dir, save_every=3, report_to=given.report_to)
    with no_time() if given.no_time else nullcontext(), spot_run as run:
        lightning.seed_everything(1, verbose=False)
        loader, items = make_loader(given)
        validation = DataLoader(Items(given.validate), batch_size=4)
        model = Module(given, run)
        callbacks = [SpotCallback(run)]
        if given.patience:
            callbacks.append(EarlyStopping("val_loss", patience=given.patience))
        if given.kind == "average":
            callbacks.append(Average())
        if given.kind == "odd-strategy":
            given.options = {"strategy": type("OddStrategy", (SingleDeviceStrategy,), {})("cpu")}
        trainer = lightning.Trainer(
            max_epochs=given.epochs if given.steps == -1 else None, max_steps=given.steps, accelerator="cpu",
            callbacks=callbacks, accumulate_grad_batches=given.accumulate,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=given.dir.parent,
            **{"val_check_interval": 2, "devices": run.world_size, "logger": False} | given.options,
        )  # fmt: skip
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(run.rank)
        loaders = {"one": loader, "two": loader} if given.kind == "two-loaders" else loader
        trainer.fit(model, loaders, validation, **given.fit)
        if given.kind == "two-fits":
            trainer.fit(model, loader, validation)

        def export(folder: Path) -> None:
            from safetensors.torch import save_file

            save_file(dict(model.state_dict()), folder / "model.safetensors")
            schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
            values = {"seen": model.seen, "epoch": trainer.current_epoch, "schedulers": schedulers}
            (folder / "values.json").write_text(json.dumps(values, default=float, sort_keys=True))

        run.finish(export)
    print(
        f"after the block: step {run.step}, {items.loaded} items, {trainer.fit_loop.epoch_loop._batches_that_stepped}"
    )
    print(f"lightning {lightning.__version__}")
    print(f"means: {json.dumps(MEANS)}")
    print(f"calls: {'; '.join(CALLS)}", flush=True)


if __name__ == "__main__":
    main()
