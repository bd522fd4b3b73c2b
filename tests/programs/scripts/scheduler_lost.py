"""A small network with a cosine learning rate; one checkpoint file with the model and the optimizer.

Its fault: the scheduler is not in the checkpoint. After a restart the cosine begins at its top again.
"""

import json
import os
import time
from pathlib import Path

import torch

STEPS, SAVE_EVERY = 80, 10
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)
torch.manual_seed(42)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
first_step = 0
path = out / "last.pt"
if path.exists():
    checkpoint = torch.load(path)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    first_step = checkpoint["step"]
    print("continuing at step", first_step, flush=True)

log = (out / f"metrics-{len(list(out.glob('metrics-*')))}.jsonl").open("w", buffering=1)
for step in range(first_step + 1, STEPS + 1):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(step))
    loss = (model(x).squeeze(1) - x.prod(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    print(json.dumps({"step": step, "loss": loss.item(), "lr": scheduler.get_last_lr()[0]}), file=log)
    time.sleep(0.02)
    if step % SAVE_EVERY == 0:
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, out / "last.pt.new")
        (out / "last.pt.new").replace(path)
log.close()
with torch.no_grad():
    (out / "result.json").write_text(json.dumps({"sum": sum(p.double().sum().item() for p in model.parameters())}))
