"""A small GPT, pretrained on Python's own documentation: accumulation, a schedule, clipping, an EMA, an evaluation."""

import math
import os
import pydoc_data.topics

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

STEPS, WIDTH, LENGTH, BATCH, MICRO = int(os.environ.get("STEPS", "200")), 64, 64, 16, 8
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")

if WORLD > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(0)
text = bytearray("".join(pydoc_data.topics.topics.values()).encode()[:200_000])
ids = torch.frombuffer(text, dtype=torch.uint8).long()
rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
held_out, train = rows[:32].to(device), TensorDataset(rows[32:])


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x) + self.places.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        return self.head(self.blocks(hidden, mask, is_causal=True))  # type: ignore[no-any-return]


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    return loss_of(model.eval(), held_out).item()


model: nn.Module = GPT().to(device)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
if WORLD > 1:
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimizer, lambda step: min((step + 1) / 20, 0.55 + 0.45 * math.cos(math.pi * step / STEPS))
)
accumulate, total = BATCH // (MICRO * WORLD), torch.zeros((), device=device)
rank = int(os.environ.get("RANK", "0"))
sampler = DistributedSampler(train, WORLD, rank, drop_last=True)
loader = DataLoader(train, MICRO, sampler=sampler, drop_last=True)
step = batches = 0
while step < STEPS:
    sampler.set_epoch(batches // len(loader))
    for (x,) in loader:
        loss = loss_of(model, x.to(device))
        (loss / accumulate).backward()
        total += loss.detach() / (BATCH // MICRO)
        batches += 1
        if batches % accumulate:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        if WORLD > 1:
            dist.all_reduce(total)
        if step % 20 == 0 and rank == 0:
            print(step, total.item(), evaluate(ema.module))
        total = torch.zeros_like(total)
        step += 1
        if step == STEPS:
            break
if rank == 0:
    torch.save(ema.module.state_dict(), "model.pt")
