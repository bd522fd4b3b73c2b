"""What of a user's extras is not the same on every rank: it is each rank's own, and saved beside what all share.

Compared at each save: values whole, and tensors by all of their bytes, because one mark in a large mask may be all that
differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from trainer.bucket.hashing import fingerprint
from trainer.checkpoint.shards import is_cut
from trainer.checkpoint.state import OWN, State, StateError
from trainer.ranks.group import RankGroup

EXTRA = "extra."
"""What the names of the extras' tensors begin with."""
COLUMNS = 8191
"""So many sums come to the host of a tensor on another device; a prime, because rows often have a power of two."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_other_names(group: RankGroup, names: Iterable[str], check_stop: Callable[[], None]) -> None:
    """See that all ranks have registered extras of the same names.

    Raises:
        StateError: they have not.
    """
    told = group.gather("extras", sorted(names), check_stop)
    for rank, theirs in enumerate(told):
        if theirs != told[0]:
            raise StateError(
                f"extra: rank 0 registers {', '.join(told[0]) or 'nothing'}, rank {rank} "
                f"{', '.join(theirs) or 'nothing'}: register the same names on every rank"
            )


def split(group: RankGroup, state: State) -> tuple[State, dict[str, torch.Tensor]]:
    """(the state that all ranks share, copies on the host of what is this rank's own). Every rank calls it."""
    if group.world_size == 1 or not state.plain["extra"]["dict"]:
        return state, {}
    names = [name for name in state.tensors if name.startswith(EXTRA)]
    form = fingerprint(*(f"{name}{state.tensors[name].dtype}{tuple(state.tensors[name].shape)}" for name in names))
    values = json.dumps(state.plain["extra"])
    rows = group.exchange([form, fingerprint(values)]).wait()
    own = {}
    if any(row[1] != rows[0][1] for row in rows):
        own[f"{OWN}{group.rank}"] = torch.frombuffer(bytearray(values.encode("ascii")), dtype=torch.uint8)
    differing = names
    if names and all(row[0] == rows[0][0] for row in rows):
        told = group.exchange(_digests([state.tensors[name] for name in names])).wait()
        differing = [name for at, name in enumerate(names) if any(row[at] != told[0][at] for row in told)]
    for name in differing:
        own[f"{OWN}{group.rank}.{name}"] = state.tensors[name].detach().to("cpu", copy=True).contiguous()
    return replace(state, tensors={k: v for k, v in state.tensors.items() if k not in set(differing)}), own


def _digests(tensors: list[torch.Tensor]) -> list[int]:
    """A fingerprint of each tensor's contents; of one that is cut over the ranks, 0."""
    sums = {
        at: _sums(_integers(tensor))  # All are under way before the first is waited for.
        for at, tensor in enumerate(tensors)
        if tensor.device.type != "cpu" and not is_cut(tensor)
    }
    return [
        0 if is_cut(tensor) else fingerprint(_bytes(sums[at].cpu() if at in sums else _integers(tensor)))
        for at, tensor in enumerate(tensors)
    ]


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, row by row, as integers of its elements' size."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGERS.get(flat.itemsize, torch.int64))


def _bytes(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.numpy()).cast("B")


def _sums(flat: torch.Tensor) -> torch.Tensor:
    """Sums of integers down the columns of a table that they fill row by row, and those of the last row."""
    whole = flat.numel() // COLUMNS * COLUMNS
    return torch.cat([flat[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64), flat[whole:].to(torch.int64)])


def joined(
    tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], rank: int, ranks: int, ranks_then: object
) -> tuple[dict[str, torch.Tensor], dict[str, Any], bool]:
    """What `split` parted, for this rank: (tensors, plain values, whether it is the first rank's instead of its own).

    Raises:
        StateError: the values are not readable.
    """
    first = ranks != ranks_then
    prefix = f"{OWN}{0 if first else rank}"
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}
    mine = {name: tensor for name, tensor in tensors.items() if name == prefix or name.startswith(f"{prefix}.")}
    found.update((name[len(prefix) + 1 :], tensor) for name, tensor in mine.items() if name != prefix)
    plain = dict(plain)
    if isinstance(strides := plain.get("strides"), Mapping):  # The first rank's: another's may have another form.
        plain["strides"] = {name: value for name, value in strides.items() if f"{prefix}.{name}" not in mine}
    if prefix in mine:
        try:
            plain["extra"] = json.loads(bytes(mine[prefix].numpy()))
        except ValueError as error:
            raise StateError(f"{prefix} holds no values ({error})") from None
    return found, plain, first and bool(mine)
