"""Loaders that accelerate has prepared, continued from every batch: the rest is the same, and so is what is drawn.

python -m trainer.launch --processes 2 tests/programs/prepared.py --dir FOLDER
"""

import argparse
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainer.training.contents import Restored
from trainer.training.feed import Feed
from trainer.training.registered import Registered

COUNT, BATCHES = 21, 12


class Items(Dataset):
    """Each item has random numbers in it, drawn when it is loaded, unless it is calm."""

    def __init__(self, calm: bool = False) -> None:
        self.calm, self.loaded = calm, []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        noise = 0.0 if self.calm else torch.rand(()).item() + np.random.rand()
        return torch.tensor([index, noise])


class Stream(IterableDataset):
    """The same, one after the other."""

    def __iter__(self):
        return (Items()[index] for index in range(COUNT))


def shuffled(**options: object) -> Callable[[], DataLoader]:
    return lambda: DataLoader(Items("num_workers" in options), batch_size=2, shuffle=True, **options)


def generated() -> DataLoader:
    return DataLoader(Items(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))


CASES: dict[str, tuple[dict[str, object], Callable[[], DataLoader]]] = {
    "shards": ({}, shuffled()),
    "split": ({"split_batches": True}, shuffled()),
    "uneven": ({"even_batches": False}, shuffled(drop_last=True)),
    "seedable": ({"use_seedable_sampler": True}, shuffled()),
    "generator": ({}, generated),
    "workers": ({}, shuffled(num_workers=1)),
    "dispatched": ({"dispatch_batches": True}, shuffled()),
    "dispatched, split": ({"dispatch_batches": True, "split_batches": True}, shuffled()),
    "stream": ({}, lambda: DataLoader(Stream(), batch_size=2)),
    "stream of each": ({"dispatch_batches": False}, lambda: DataLoader(Stream(), batch_size=2)),
}


def seed_all(rank: int) -> None:
    torch.manual_seed(rank)
    np.random.seed(rank)


class Trial:
    """A loader in an attempt; each step draws random numbers too."""

    def __init__(self, accelerator: Accelerator, make: Callable[[], DataLoader], seed: int) -> None:
        torch.manual_seed(5)
        self.loader, self.processes = accelerator.prepare(make()), accelerator.num_processes
        seed_all(seed)
        self.contents = Registered(True, {})

    def steps(self):
        for batch in Feed(self.loader, self.contents, self.processes, print).epochs():
            is_last = bool(self.loader.end_of_dataloader)
            yield batch.tolist(), is_last, torch.rand(()).item(), np.random.rand(), self.contents.data.epoch

    def saved(self) -> Restored:
        state = self.contents.collect()
        manifest = SimpleNamespace(step=0)
        return Restored("saved", manifest, state.tensors, state.plain, self.contents.streams(), True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    given = parser.parse_args()
    found = {}
    for name in given.cases:
        config, make = CASES[name]
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**config))
        rank = accelerator.process_index
        whole = Trial(accelerator, make, rank)
        places, steps = [], []
        for step in islice(whole.steps(), BATCHES + 3):
            steps.append(step)
            places.append(whole.saved())
        wrong = []
        for place in range(BATCHES):
            again = Trial(accelerator, make, 100 + rank)
            again.contents.load(places[place])
            if list(islice(again.steps(), 3)) != steps[place + 1 : place + 4]:
                wrong.append(place)
        items = getattr(again.loader.dataset, "loaded", [])
        found[name] = {"wrong": wrong, "ends": [step[1] for step in steps], "loaded": len(items)}
        accelerator.free_memory()
    (given.dir / f"found-{rank}.json").write_text(json.dumps(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
