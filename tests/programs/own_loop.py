"""A training loop of somebody's own, in the ways that people write one; it strikes itself at a step.

python -m trainer.launch tests/programs/own_loop.py --dir FOLDER --until 20 --order shuffle --strike 7:SIGKILL
"""

from trainer import SpotRun  # isort: skip

import argparse
import json
import os
import random
import signal
from collections import deque, namedtuple
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from at_limit import reach_limit
from no_time import no_time
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, WeightedRandomSampler

Pair = namedtuple("Pair", "x y")


class Items(Dataset):
    """Points; `noise` adds random numbers to an item each time it is loaded."""

    def __init__(self, count: int, noise: bool = False) -> None:
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
        self.noise, self.loaded = noise, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Pair:
        self.loaded += 1
        x = self.x[index]
        if self.noise:
            x = x + 0.01 * torch.randn(6) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return Pair(x, x.sum(0, keepdim=True))


class Stream(IterableDataset):
    """The same points, one after the other."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __iter__(self):
        return (self.items[index] for index in range(len(self.items)))


class Ema:
    """An average of the weights, as people write it; `counts` is in its state_dict or forgotten."""

    def __init__(self, model: nn.Module, forgets: bool) -> None:
        self.shadow = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.counts, self.forgets = 0, forgets

    def update(self, model: nn.Module) -> None:
        self.counts += 1
        decay = min(0.9, self.counts / (self.counts + 2))
        for name, value in model.named_parameters():
            self.shadow[name].lerp_(value.detach(), 1 - decay)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow} if self.forgets else {"shadow": self.shadow, "counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        self.shadow = {name: value.clone() for name, value in state["shadow"].items()}
        self.counts = state.get("counts", 0)


def make_loader(order: str, items: Items):
    generator = torch.Generator().manual_seed(4)
    if order == "stream":
        return DataLoader(Stream(items), batch_size=4)
    if order == "unequal":  # The second rank has fewer samples than the first.
        part = torch.utils.data.Subset(items, range(dist.get_rank(), len(items) // (1 + dist.get_rank()), 2))
        return DataLoader(part, batch_size=4, shuffle=True)
    if order == "distributed":
        return DataLoader(items, batch_size=4, sampler=DistributedSampler(items, seed=5))
    if order == "weighted":
        weights = torch.arange(1, len(items) + 1, dtype=torch.float64)
        return DataLoader(items, batch_size=4, sampler=WeightedRandomSampler(weights, len(items), generator=generator))
    if order == "generator":
        return DataLoader(items, batch_size=4, shuffle=True, generator=generator)
    if order == "workers":
        return DataLoader(items, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    return DataLoader(items, batch_size=4, shuffle=order == "shuffle")


def strike(run: SpotRun, name: str) -> None:
    """Send this process a signal, wait until it got a cloud's notice, which a test then sends, or reach a limit."""
    if name == "limit":
        reach_limit(run)
        return
    if name == "notice":
        print("waiting for a notice", flush=True)
    else:
        os.kill(os.getpid(), signal.Signals[name])
    assert run.notices.received.wait(60)


def everywhere(value: float, ranks: int) -> float:
    """The sum over all ranks."""
    total = torch.tensor(value)
    if ranks > 1:
        dist.all_reduce(total)
    return total.item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--until", type=int, default=20)
    parser.add_argument("--order", default="shuffle")
    parser.add_argument("--count", type=int, default=18)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--strike", default="0:SIGKILL")
    parser.add_argument("--enough-at", type=int, default=0, help="break off after this step")
    parser.add_argument("--apart", action="store_true", help="each rank trains its own critic")
    parser.add_argument("--apart-at", type=int, default=0, help="from this step on, each rank has its learning rate")
    parser.add_argument("--forgets", action="store_true")
    parser.add_argument("--no-time", action="store_true", help="a stop never leaves time for the rest of a step")
    given = parser.parse_args()
    step, name = given.strike.split(":")
    with no_time() if given.no_time else nullcontext(), SpotRun(given.dir, save_every=3) as run:
        if run.world_size > 1:
            dist.init_process_group("gloo")
        torch.manual_seed(0)
        items = Items(given.count, noise=given.order == "noise")
        loader = make_loader(given.order, items)
        model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, 1))
        critic = nn.Linear(1, 1)
        trained, judge = model, critic
        if run.world_size > 1:
            trained = nn.parallel.DistributedDataParallel(model)
            judge = critic if given.apart else nn.parallel.DistributedDataParallel(critic)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.02)
        other = torch.optim.SGD(critic.parameters(), lr=0.01, momentum=0.9)
        ema = Ema(model, given.forgets)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(other, patience=1, factor=0.5)
        dice = np.random.default_rng(3)
        run.state["recent"] = deque(maxlen=3)
        run.register(zeta=other, model=trained, alpha=optimizer, critic=judge, ema=ema, plateau=plateau, dice=dice)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.until)  # Sets the learning rate again.
        run.register(scheduler=scheduler)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(run.rank)
        losses = []
        for batch in run.steps(loader, until=given.until, accumulate=given.accumulate):
            if run.step + 1 == int(step) and run.rank == 0:
                strike(run, name)
            loss = (trained(batch.x) - batch.y).square().mean() / given.accumulate
            loss = loss + 0.1 * judge(loss.detach().reshape(1, 1)).square().mean()
            loss.backward()
            losses.append(loss.item())
            if run.ends_step:
                if run.step + 1 == given.apart_at:
                    other.param_groups[0]["lr"] *= run.rank + 1
                optimizer.step()
                other.step()
                scheduler.step()
                plateau.step(everywhere(sum(losses), run.world_size))  # Else each rank has a learning rate of its own.
                optimizer.zero_grad()
                other.zero_grad()
                ema.update(model)
                run.state["best"] = min(run.state.get("best", np.float32(9)), np.float32(sum(losses)))
                run.state["recent"].append(dice.integers(100))
                run.log(loss=sum(losses), lr_of_other=other.param_groups[0]["lr"])
                losses = []
                if given.enough_at and run.step + 1 >= given.enough_at:
                    break

        def export(folder: Path) -> None:
            parts = {"model": model.state_dict(), "critic": critic.state_dict(), "ema": ema.shadow}
            tensors = {f"{part}.{name}": value for part, held in parts.items() for name, value in held.items()}
            save_file(tensors, folder / "all.safetensors")
            values = {"state": repr(run.state), "plateau": plateau.state_dict(), "counts": ema.counts}
            (folder / "values.json").write_text(json.dumps(values, sort_keys=True))

        run.finish(export)
    print(f"after the block: step {run.step}, {items.loaded} items", flush=True)


if __name__ == "__main__":
    main()
