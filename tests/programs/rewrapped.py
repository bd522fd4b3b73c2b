"""Checkpoints of a model in one wrapper, restored into it in others; the tensors' bytes are printed as a hash.

python -m trainer.launch --processes 2 tests/programs/rewrapped.py --dir FOLDER ddp fsdp
"""

from trainer import SpotRun  # isort: skip

import argparse
import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


class Net(nn.Module):
    """One part is compiled, whatever is around the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrap == "compiled":
        model.first = torch.compile(model.first, backend="eager")
        return torch.compile(model, backend="eager")
    if wrap == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.first, model.last, model):
            fully_shard(part, mesh=mesh)
    return model


def hashed(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A hash of all parameters, buffers and optimizer state, whole."""
    held = [*model.parameters(), *model.buffers()]
    held += [value for parameter in model.parameters() for _, value in sorted(optimizer.state[parameter].items())]
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in held]
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in whole)).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("wrap")
    given = parser.parse_args()
    with SpotRun(given.dir, save_every=2) as run:
        if run.world_size > 1:
            dist.init_process_group("gloo")
        torch.manual_seed(run.step)
        model = wrapped(Net(), given.wrap)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        run.register(model=model, optimizer=optimizer)
        if run.step:
            print(json.dumps({"restored": hashed(model, optimizer), "step": run.step}), flush=True)
        for _ in run.steps([0, 1], until=run.step + 2):
            model(torch.full((3, 6), run.step / 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        print(json.dumps({"saved": hashed(model, optimizer), "step": run.step}), flush=True)
        run.finish()


if __name__ == "__main__":
    main()
