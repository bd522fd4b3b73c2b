"""A character model of Python's own documentation, in a plain torch loop; on one process or several."""

import os
import pydoc_data.topics

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

STEPS, WIDTH, LENGTH = int(os.environ.get("STEPS", "200")), 64, 32
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")

if WORLD > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(RANK)
text = "".join(pydoc_data.topics.topics.values())[:100_000]
letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
ids = torch.tensor([letters[letter] for letter in text])
samples = TensorDataset(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(letters), WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, len(letters)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.body(self.embed(x))[0]
        return self.head(hidden)  # type: ignore[no-any-return]


model: nn.Module = Model().to(device)
if WORLD > 1:
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
loader = DataLoader(samples, batch_size=16, sampler=DistributedSampler(samples, WORLD, RANK))
step = 0
while step < STEPS:
    loader.sampler.set_epoch(step // len(loader))
    for (x,) in loader:
        x = x.to(device)
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step == STEPS:
            break
if RANK == 0:
    torch.save(model.state_dict(), "model.pt")
