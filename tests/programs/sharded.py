"""Sharded states, saved by N ranks and restored by M, for all N and M up to the number of processes; bit by bit.

python -m trainer.launch --processes 4 tests/programs/sharded.py --dir FOLDER
"""

import argparse
import json
import math
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainer import checkpoint, layout, restore, shards, state
from trainer.layout import AttemptName, CheckpointName, Manifest


class Net(nn.Module):
    """Odd sizes, a tied weight, a buffer, a 0-d and an empty parameter, and one in another type."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 6))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("seen", torch.tensor(3, dtype=torch.int64))
        self.register_buffer("nothing", torch.empty(0, 4, dtype=torch.bfloat16))

    def forward(self, x):
        return self.head(self.body(self.embed(x))) * self.scale


def trained(mesh: DeviceMesh | None, seed: int) -> tuple[Net, list[torch.optim.Optimizer]]:
    """A model after two steps, with two optimizers; the same numbers however it is cut."""
    torch.manual_seed(seed)
    model = Net()
    if mesh is not None:
        fully_shard(model.body, mesh=mesh)
        fully_shard(model, mesh=mesh)
    body = list(model.body.parameters())
    rest = [parameter for parameter in model.parameters() if not any(parameter is other for other in body)]
    optimizers = [torch.optim.AdamW(body, lr=0.1), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]
    for step in range(2):
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * seed + 10 * step + number)
            whole = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                offsets, sizes = shards.box_here(parameter, dist.get_rank())
                whole = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
                parameter.grad = shards.like(parameter, whole.contiguous())
            else:
                parameter.grad = whole
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def extra(mesh: DeviceMesh | None, sign: int) -> dict[str, object]:
    """What a user registered: cut by columns, the same on all, of small integers; and a plain one."""
    columns = sign * torch.arange(35).reshape(5, 7)
    both = sign * torch.arange(6, dtype=torch.int8)
    if mesh is None:
        return {"columns": columns, "both": both, "name": "mine"}
    cut = distribute_tensor(columns, mesh, [Shard(1)]), distribute_tensor(both, mesh, [Replicate()])
    return {"columns": cut[0], "both": cut[1], "name": "mine"}


def whole_of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Every tensor, put together, as bytes."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = (
            full.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if full.numel() else b""
        )
    return found


def save(folder: Path, live: state.State, rank: int, ranks: int, group: dist.ProcessGroup) -> None:
    """What the Saver does, by the ranks of a group."""
    folder.mkdir(parents=True, exist_ok=True)
    share = shards.deal(shards.parts_of(live.tensors, ranks, live.buffers), ranks)[rank]
    path = folder / checkpoint.share_name(rank)
    record = checkpoint.write_share(path, share, lambda part: shards.local(live.tensors[part.name]).contiguous())
    records = [None] * ranks
    dist.all_gather_object(records, record, group=group)
    if rank == 0:
        files = {checkpoint.share_name(other): record for other, record in enumerate(records)}
        files[layout.STATE] = checkpoint.write_state(folder, live.plain)
        checkpoint.write_manifest(folder, Manifest("checkpoint", files, {"step": 2}))
    dist.barrier(group)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    base = parser.parse_args().dir
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(count))) for count in range(1, world + 1)]
    meshes = [DeviceMesh("cpu", list(range(count))) for count in range(1, world + 1)]
    layouts = [(count, True) for count in range(1, world + 1)] + [(2, False)]
    reference = whole_of(state.collect(*trained(None, 1), {}, {"mine": extra(None, 1)}).tensors)
    said = []

    def folder_of(ranks: int, cut: bool) -> Path:
        return base / str(CheckpointName(2, AttemptName(ranks, "0000ff" if cut else "000000"), 1))

    for ranks, cut in layouts:
        if rank < ranks:
            model, optimizers = trained(meshes[ranks - 1] if cut else None, 1)
            live = state.collect(model, optimizers, {}, {"mine": extra(meshes[ranks - 1] if cut else None, 1)})
            assert live.steady.isdisjoint(live.buffers)
            save(folder_of(ranks, cut), live, rank, ranks, groups[ranks - 1])
        dist.barrier()
    for from_ranks, from_cut in layouts:
        for ranks, cut in layouts:
            if rank < ranks:
                model, optimizers = trained(meshes[ranks - 1] if cut else None, 2)
                for optimizer in optimizers:
                    optimizer.state.clear()  # As in a new attempt: no step was done yet.
                live = state.collect(model, optimizers, {}, {"mine": extra(meshes[ranks - 1] if cut else None, -1)})
                loaded = restore.load(folder_of(from_ranks, from_cut), live, rank, ranks)
                held = sum(shards.local(tensor).numel() for tensor in loaded.tensors.values())
                everything = sum(math.prod(tensor.shape) for tensor in loaded.tensors.values())
                _, got = state.apply(model, optimizers, loaded.tensors, loaded.plain)
                same = whole_of(state.collect(model, optimizers, {}, got).tensors) == reference
                said.append({"from": [from_ranks, from_cut], "to": [ranks, cut], "same": same,
                             "held": held / everything})  # fmt: skip
            dist.barrier()
    (base / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


main()
