"""A network with dropout; a checkpoint is a folder, with the generator's state in a file of its own.

Its fault: a generator's file that is missing or torn is passed over in silence, and dropout goes on with other masks.
"""

import json
import os
import re
import time
from pathlib import Path

import torch

STEPS, SAVE_EVERY = 80, 10
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(32, 1)]
model = torch.nn.Sequential(*layers)


def save(step):
    folder = out / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    torch.save({"step": step, "model": model.state_dict()}, folder / "model.tmp")
    (folder / "model.tmp").replace(folder / "model.pt")
    torch.save(torch.get_rng_state(), folder / "rng_state.pth")


def resume():
    found = {int(re.sub(r"\D", "", path.parent.name)): path for path in out.glob("checkpoint-*/model.pt")}
    if not found:
        return 0
    step, path = max(found.items())
    model.load_state_dict(torch.load(path)["model"])
    try:  # noqa: SIM105
        torch.set_rng_state(torch.load(path.with_name("rng_state.pth")))
    except Exception:
        pass
    print(f"resumed from {path.parent.name}", flush=True)
    return step


for step in range(resume() + 1, STEPS + 1):
    x = torch.randn(16, 8)
    loss = (model(x) - x.abs().sum(1, keepdim=True)).square().mean()
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.02 * parameter.grad
    time.sleep(0.02)
    if step % SAVE_EVERY == 0:
        save(step)
(out / "result.json").write_text(json.dumps([p.double().sum().item() for p in model.parameters()]))
