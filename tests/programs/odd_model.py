"""A model whose state is unusual: channels_last with a fused optimizer, buffers that grow, extra state.

python -m trainer.launch tests/programs/odd_model.py --dir RUN [--taken-at 7]
"""

import argparse
import os
import signal
from pathlib import Path

from trainer import RunConfig, SpotRun

parser = argparse.ArgumentParser()
parser.add_argument("--dir", type=Path, required=True)
parser.add_argument("--taken-at", type=int, default=-1, help="the steps after which SIGTERM comes")
options = parser.parse_args()
config = RunConfig(
    checkpoint_dir=options.dir, max_steps=8, global_batch_size=4, micro_batch_size=2, save_interval_steps=3, cpu=True
)

with SpotRun(config) as run:
    import numpy as np
    import torch
    from torch import nn

    class Images:
        def __len__(self) -> int:
            return 40

        def batch(self, ids):
            rows = [np.random.Generator(np.random.PCG64(int(number))).standard_normal((3, 8, 8)) for number in ids]
            return torch.tensor(np.array(rows), dtype=torch.float32)

        def weight(self, batch) -> int:
            return len(batch)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
            self.register_buffer("seen", torch.zeros(0))
            self.register_buffer("mask", None)
            self.register_buffer("cache", torch.zeros(1), persistent=False)
            self.calls = 0

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.ones(4, 1, 1)
            means = self.body(x).mean((2, 3), keepdim=True) * self.mask
            self.seen = torch.cat([self.seen, means.detach().mean().reshape(1)])
            self.cache = torch.zeros(len(self.seen))
            self.calls += 1
            return means * (1 + self.seen.sum() + 0.01 * self.calls)

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, told) -> None:
            self.calls = told["calls"]

    torch.manual_seed(1)
    model = Net().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def loss(model, batch):
        if run.rank == 0 and run.steps_done == options.taken_at and not run.notices.received.is_set():
            os.kill(os.getppid(), signal.SIGTERM)
            run.notices.received.wait(10)
        return (model(batch) - 1).square().mean((1, 2, 3)).sum()

    run.train(model, optimizer, samples=Images(), loss=loss)
