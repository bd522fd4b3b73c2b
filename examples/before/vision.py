"""A network with batch normalisation on images of digits, augmented in loader workers; one process or several."""

import os
import random

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

STEPS, BATCH, MICRO = int(os.environ.get("STEPS", "200")), 32, 16
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
BARS = [(1, 3, 2, 9), (2, 2, 7, 3), (2, 9, 7, 10), (7, 3, 8, 9), (8, 2, 13, 3), (8, 9, 13, 10), (13, 3, 14, 9)]
DIGITS = ["012456", "25", "02346", "02356", "1235", "01356", "013456", "025", "0123456", "012356"]


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Seven bars make a digit."""

    def __init__(self, count: int) -> None:
        dice = torch.Generator().manual_seed(0)
        self.y = torch.randint(10, (count,), generator=dice).tolist()
        self.x = 0.5 * torch.randn(count, 1, 16, 12, generator=dice)
        for image, digit in zip(self.x, self.y, strict=True):
            for top, left, bottom, right in (BARS[int(bar)] for bar in DIGITS[digit]):
                image[0, top:bottom, left:right] += 1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shifted = self.x[index].roll((random.randint(-2, 2), random.randint(-1, 1)), (1, 2))
        return shifted + 0.2 * torch.randn(shifted.shape), self.y[index]


def mean(loss: torch.Tensor) -> float:
    """The mean over all processes."""
    total = loss.detach().clone()
    if WORLD > 1:
        dist.all_reduce(total)
    return total.item() / WORLD


if WORLD > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(0)
data = Images(600)
model: nn.Module = nn.Sequential(
    *[nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()],
    *[nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()],
    *[nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(32 * 9, 10)],
).to(device)
if WORLD > 1:
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, STEPS + 1)
accumulate, total = BATCH // (MICRO * WORLD), 0.0
rank = int(os.environ.get("RANK", "0"))
sampler = DistributedSampler(data, WORLD, rank)
loader = DataLoader(data, MICRO, sampler=sampler, num_workers=2)
batches = 0
while batches < STEPS * accumulate:
    sampler.set_epoch(batches // len(loader))
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device)) / accumulate
        loss.backward()
        total += mean(loss)
        batches += 1
        if batches % accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total = 0.0
        if batches == STEPS * accumulate:
            break
if rank == 0:
    torch.save(model.state_dict(), "model.pt")
