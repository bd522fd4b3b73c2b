"""A regression fed by two loader workers; saves after each epoch, and at SIGTERM after the step that is under way.

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


def save(model, epoch, batch):
    torch.save({"model": model.state_dict(), "epoch": epoch, "batch": batch}, out / "last.pt.tmp")
    (out / "last.pt.tmp").replace(out / "last.pt")


def main():
    signal.signal(signal.SIGTERM, stop)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(2)
    x, model = torch.randn(320, 5), torch.nn.Linear(5, 1)
    data, order, first_epoch, first_batch = TensorDataset(x, x.sum(1, keepdim=True)), torch.Generator(), 0, 0
    loader = DataLoader(data, BATCH, sampler=RandomSampler(x, generator=order), num_workers=2, persistent_workers=True)
    if (out / "last.pt").exists():
        saved = torch.load(out / "last.pt")
        model.load_state_dict(saved["model"])
        first_epoch, first_batch = saved["epoch"], saved["batch"]
    for epoch in range(first_epoch, EPOCHS):
        order.manual_seed(epoch)
        for batch, (inputs, targets) in enumerate(loader):
            if epoch == first_epoch and batch < first_batch:
                continue
            loss = (model(inputs) - targets).square().mean()
            for parameter, slope in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                parameter.data -= 0.05 * slope
            time.sleep(0.03)
            if stopping:
                save(model, epoch, batch + 1)
                sys.exit(143)
        save(model, epoch + 1, 0)
    torch.save(model.state_dict(), out / "final.pt")


if __name__ == "__main__":
    main()
