"""Sharded states, saved by N ranks and restored by M, for all N and M up to the number of processes; bit by bit.

python -m trainer.launch --processes 4 tests/programs/sharded.py --dir FOLDER
"""

import argparse
import json
import math
import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainer.checkpoint import restore, shards, state
from trainer.layout.names import RunPaths, list_checkpoints
from trainer.ranks.group import RankGroup
from trainer.training.host import open_host
from trainer.training.session import Session


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


def seat(name: str, ranks: int, everybody: RankGroup, process_group: dist.ProcessGroup) -> RankGroup | None:
    """This process' seat among the first few ranks, with a store of their own; None where it has none."""
    listener = socket.create_server(("127.0.0.1", 0)) if everybody.rank == 0 else None
    port = everybody.rank0_does(f"store/{name}", lambda: listener.getsockname()[1] if listener else None)
    if everybody.rank >= ranks:
        return None
    # As the launcher tells its processes.
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), SKYSPOT_STORE_PORT=str(port))
    if listener:
        os.environ["SKYSPOT_LISTEN_FD"] = str(listener.detach())
    group = RankGroup()
    group._control = process_group if ranks > 1 else None  # form_groups makes the default group, too, and there is one.
    return group


class Contents:
    """Two steps of training, as a session saves them."""

    done = samples_done = 2
    position = spoilt_remedy = ""
    only_finite = spoilt_ends = False
    watched = frozenset()

    def __init__(self, rank: int, mesh: DeviceMesh | None) -> None:
        self.rank, self.mesh = rank, mesh
        self.model, self.optimizers = trained(mesh, 1)

    def collect(self) -> state.State:
        return state.collect(self.model, self.optimizers, {}, {"mine": extra(self.mesh, 1)})

    def streams(self) -> torch.Tensor:
        return own_of(self.rank)

    def facts(self) -> dict[str, object]:
        return {}


def save(group: RankGroup, folder: Path, mesh: DeviceMesh | None) -> None:
    """In the background, as the training loop does; this rank waits for its copy, and steps on."""
    said = []
    host = open_host(folder, group, "sharded")
    host.print_line = said.append
    contents = Contents(group.rank, mesh)
    live = contents.collect()
    assert live.steady.isdisjoint(live.buffers)
    session = Session(host, contents)
    session.saver.adopt(str(host.attempt_name), None)
    session.prepare()
    live = contents.collect()
    contents.collect = lambda: live
    session.save()
    for tensor in live.tensors.keys() - live.steady:
        shards.local(live.tensors[tensor]).add_(1)
    session.await_copied()
    for optimizer in contents.optimizers:
        optimizer.step()
    session.saver.wait()
    assert session.saver.committed, said
    session.saver.settle()
    assert not said  # Neither was there no memory for copies, nor did it read back otherwise.


def own_of(rank: int) -> torch.Tensor:
    """In place of a rank's random streams."""
    return torch.tensor([rank, 7 * rank], dtype=torch.uint8)


def load(group: RankGroup, paths: RunPaths, mesh: DeviceMesh | None) -> tuple[dict[str, bytes], float, bool]:
    """(all tensors as they are after a restore, how much of them this rank has read, whether its own is its own)."""
    model, optimizers = trained(mesh, 2)
    for optimizer in optimizers:
        optimizer.state.clear()  # As in a new attempt: no step was done yet.
    live = state.collect(model, optimizers, {}, {"mine": extra(mesh, -1)})
    [name] = list_checkpoints(paths)
    loaded = restore.load(paths.checkpoint(name), live, group.rank, group.world_size)
    own = loaded.tensors.pop(f"{state.RANDOM}{group.rank}", None)
    is_own = loaded.manifest.facts["world_size"] <= group.rank if own is None else own.equal(own_of(group.rank))
    held = sum(shards.local(tensor).numel() for tensor in loaded.tensors.values())
    everything = sum(math.prod(tensor.shape) for tensor in loaded.tensors.values())
    _, got = state.apply(model, optimizers, loaded.tensors, loaded.plain)
    return whole_of(state.collect(model, optimizers, {}, got).tensors), held / everything, is_own


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    base = parser.parse_args().dir
    everybody = RankGroup(timeout_s=60.0)
    everybody.form_groups(on_gpu=False)
    rank, world = everybody.rank, everybody.world_size
    groups = {count: dist.new_group(list(range(count)), timeout=timedelta(seconds=60)) for count in range(1, world)}
    meshes = {count: DeviceMesh("cpu", list(range(count))) for count in range(1, world + 1)}
    layouts = {f"{count}-cut": (count, True) for count in meshes} | {"2-whole": (2, False)}
    seats = {name: seat(name, ranks, everybody, groups[ranks]) for name, (ranks, _) in layouts.items() if ranks < world}
    seats[f"{world}-cut"] = everybody
    reference = whole_of(state.collect(*trained(None, 1), {}, {"mine": extra(None, 1)}).tensors)
    said = []
    for name, (ranks, cut) in layouts.items():
        if group := seats[name]:
            save(group, base / name, meshes[ranks] if cut else None)
        dist.barrier()
    for saved, there in layouts.items():
        for name, (ranks, cut) in layouts.items():
            if group := seats[name]:
                got, held, is_own = load(group, RunPaths(base / saved), meshes[ranks] if cut else None)
                said.append({"from": there, "to": (ranks, cut), "same": got == reference and is_own, "held": held})
            dist.barrier()
    (base / f"said-{rank}.json").write_text(json.dumps(said))
    everybody.mark_left()
    everybody.await_others_left(10)
    dist.destroy_process_group()


main()
