"""A small network under AdamW; saves the model and the optimizer, a file each, every 10 steps.

Its fault: a restart reads the model's file alone. AdamW begins with empty moments.
"""

import os
import time
from pathlib import Path

import torch
from torch import nn

STEPS, SAVE_EVERY = 80, 10
out = Path(os.environ["OUT"])


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 8, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def save(what, name):
    torch.save(what, out / f"{name}.tmp")
    (out / f"{name}.tmp").replace(out / name)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = 0
    if (out / "model.pt").exists():
        saved = torch.load(out / "model.pt")
        model.load_state_dict(saved["model"])
        start = saved["step"]
        print(f"=> loaded checkpoint (step {start})", flush=True)
    for step in range(start, STEPS):
        x, y = batch(step)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.02)
        if (step + 1) % SAVE_EVERY == 0:
            print(f"step {step + 1} loss {loss.item():.5f}", flush=True)
            save(optimizer.state_dict(), "optimizer.pt")
            save({"step": step + 1, "model": model.state_dict()}, "model.pt")
    save(model.state_dict(), "final.pt")


if __name__ == "__main__":
    main()
