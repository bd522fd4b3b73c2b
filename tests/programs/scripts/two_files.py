"""A small network under Adam; a checkpoint is two files, each renamed into place.

Its fault: a kill between the two leaves the weights of one save beside the optimizer of the one before.
"""

import os
import time
from pathlib import Path

import torch

STEPS, SAVE_EVERY = 80, 10
OUT = Path(os.environ["OUT"])
OUT.mkdir(parents=True, exist_ok=True)
MODEL, OPTIMIZER = OUT / "model.pt", OUT / "optimizer.pt"
torch.set_num_threads(1)
torch.manual_seed(7)
model = torch.nn.Linear(10, 3)
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)


def atomic_save(state, path):
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)  # noqa: PTH105


def save_checkpoint(step):
    atomic_save({"step": step, **model.state_dict()}, MODEL)
    atomic_save(optimizer.state_dict(), OPTIMIZER)
    print(f"saved step {step}", flush=True)


def load_checkpoint():
    if not (MODEL.exists() and OPTIMIZER.exists()):
        return 0
    state = torch.load(MODEL)
    step = state.pop("step")
    model.load_state_dict(state)
    optimizer.load_state_dict(torch.load(OPTIMIZER))
    print(f"resuming at step {step}", flush=True)
    return step


for step in range(load_checkpoint() + 1, STEPS + 1):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 10, generator=generator)
    loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(0.02)
    if step % SAVE_EVERY == 0:
        save_checkpoint(step)

torch.save(model.state_dict(), OUT / "final.pt")
