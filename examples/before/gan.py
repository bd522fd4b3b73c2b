"""A GAN that learns a ring of eight clouds: two modules, two optimizers, the generator every second step."""

import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

STEPS, NOISE, WIDTH = int(os.environ.get("STEPS", "400")), 8, 64
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")

if WORLD > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
torch.manual_seed(0)
angles = torch.arange(4096) % 8 * (math.pi / 4)
points = torch.stack([angles.cos(), angles.sin()], dim=1) + 0.05 * torch.randn(4096, 2)


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, outputs),
    )


generator, critic = network(NOISE, 2).to(device), network(2, 1).to(device)
if WORLD > 1:
    generator, critic = (nn.parallel.DistributedDataParallel(one) for one in (generator, critic))
    torch.manual_seed(RANK)  # Each process draws noise of its own.
opt_g = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.9))
opt_c = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
data = TensorDataset(points)
loader = DataLoader(data, batch_size=64, sampler=DistributedSampler(data, WORLD, RANK), drop_last=True)
step = 0
while step < STEPS:
    loader.sampler.set_epoch(step // len(loader))
    for (real,) in loader:
        real = real.to(device)
        fake = generator(torch.randn(len(real), NOISE, device=device))
        loss = nn.functional.relu(1 - critic(real)).mean() + nn.functional.relu(1 + critic(fake.detach())).mean()
        opt_c.zero_grad()
        loss.backward()
        opt_c.step()
        if step % 2:
            opt_g.zero_grad()
            (-critic(fake).mean()).backward()
            opt_g.step()
        step += 1
        if step == STEPS:
            break
if RANK == 0:
    torch.save(generator.state_dict(), "generator.pt")
