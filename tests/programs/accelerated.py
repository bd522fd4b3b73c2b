"""A loop with accelerate: DDP or FSDP2, accumulation, mixed precision, a loss scale; it strikes itself at a step.

python -m trainer.launch --processes 2 tests/programs/accelerated.py --dir FOLDER --until 12 --strike 7:SIGKILL
"""

from trainer import SpotRun  # isort: skip

import argparse
import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin
from cut_on_cpu import cut_on_cpu
from no_time import no_time
from torch import nn
from torch.utils.data import DataLoader, Dataset

from trainer.checkpoint.shards import is_cut
from trainer.training import buckets


class Items(Dataset):
    """Points, a little different each time that they are loaded."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return x + 0.01 * torch.randn(6), x.sum(0, keepdim=True)


class Net(nn.Module):
    """Wide enough for several buckets of gradients in DDP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, width), nn.LayerNorm(width), nn.Dropout(0.2), nn.ReLU())
        self.last = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def sharded(model: nn.Module) -> nn.Module:
    """Cut over the ranks by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (model.first, model.last, model):
        fully_shard(part, mesh=mesh)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--until", type=int, default=12)
    parser.add_argument("--strike", default="0:SIGKILL")
    parser.add_argument("--wrap", default="ddp", help="ddp, fsdp, or plugin: accelerate's FSDP2")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--scale", type=float, default=0.0, help="the first loss scale; 0: none")
    parser.add_argument("--loader", default="{}", help="options of accelerate's loaders, as JSON")
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--late", action="store_true", help="make the Accelerator inside of the block")
    parser.add_argument("--forgets", action="store_true", help="the scaler is not registered")
    parser.add_argument("--without-pass", action="store_true", help="DDP regroups its buckets at the first step")
    parser.add_argument("--no-time", action="store_true", help="a stop never leaves time for the rest of a step")
    given = parser.parse_args()
    if given.without_pass:
        buckets.settle_at_first_pass = lambda module: None
    step, name = given.strike.split(":")
    with ExitStack() as stack:
        if given.no_time:
            stack.enter_context(no_time())
        run = stack.enter_context(SpotRun(given.dir, save_every=3)) if given.late else None
        plugin = None
        if given.wrap == "plugin":
            cut_on_cpu()
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Sequential"],
            )
        accelerator = Accelerator(
            cpu=True,
            mixed_precision=given.precision,
            gradient_accumulation_steps=given.accumulate,
            dataloader_config=DataLoaderConfiguration(**json.loads(given.loader)),
            fsdp_plugin=plugin,
        )
        if given.scale:  # Accelerate makes none on a CPU.
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=given.scale, growth_interval=4)
        torch.manual_seed(0)
        model = Net(given.width)
        wrapped = sharded(model) if given.wrap == "fsdp" else model
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.until * accelerator.num_processes)
        loader = DataLoader(Items(), batch_size=4, shuffle=True)
        if given.wrap != "fsdp":
            wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
        else:
            optimizer = accelerator.prepare(optimizer)
        scheduler, loader = accelerator.prepare(scheduler, loader)
        assert all(is_cut(parameter) == (given.wrap != "ddp") for parameter in wrapped.parameters())
        torch.manual_seed(accelerator.process_index)
        run = run or stack.enter_context(SpotRun(given.dir, save_every=3))
        more = {} if given.forgets or not given.scale else {"scaler": accelerator.scaler}
        run.register(model=wrapped, optimizer=optimizer, scheduler=scheduler, **more)
        for x, y in run.steps(loader, until=given.until):
            if run.step + 1 == int(step) and run.rank == 0:
                os.kill(os.getpid(), signal.Signals[name])
                assert run.notices.received.wait(60)
            with accelerator.accumulate(wrapped):
                loss = F.mse_loss(wrapped(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            run.log(loss=loss, skipped=int(optimizer.step_was_skipped), scale=accelerator.scaler and given.scale)
        run.finish()
    print(f"after the block: step {run.step}, epoch {run.epoch}", flush=True)


if __name__ == "__main__":
    main()
