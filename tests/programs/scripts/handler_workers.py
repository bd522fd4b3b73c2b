"""A regression fed by two loader workers; saves after each epoch. At SIGTERM it leaves after the current epoch.

Its fault: SIGTERM reaches the workers too. They die of it, the loader raises an error, and nothing is saved.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

EPOCHS, BATCH = 4, 16
out = Path(os.environ["OUT"])
stopping = False


def stop(signum, frame):
    global stopping
    stopping = True


def save(model, epoch):
    torch.save({"model": model.state_dict(), "epoch": epoch}, out / "last.pt.tmp")
    (out / "last.pt.tmp").replace(out / "last.pt")


def main():
    signal.signal(signal.SIGTERM, stop)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(2)
    x, model = torch.randn(320, 5), torch.nn.Linear(5, 1)
    data, order, first_epoch = TensorDataset(x, x.sum(1, keepdim=True)), torch.Generator(), 0
    loader = DataLoader(data, BATCH, sampler=RandomSampler(x, generator=order), num_workers=2, persistent_workers=True)
    if (out / "last.pt").exists():
        saved = torch.load(out / "last.pt")
        model.load_state_dict(saved["model"])
        first_epoch = saved["epoch"]
    for epoch in range(first_epoch, EPOCHS):
        order.manual_seed(epoch)
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            for parameter, slope in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                parameter.data -= 0.05 * slope
            time.sleep(0.03)
        save(model, epoch + 1)
        if stopping:
            sys.exit(143)
    torch.save(model.state_dict(), out / "final.pt")


if __name__ == "__main__":
    main()
