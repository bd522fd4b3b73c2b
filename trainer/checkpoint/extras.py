"""Extras, and extra state of modules, that differ between ranks: each rank's own, saved beside what all ranks share.

Each save compares the values, and the tensors by all of their bytes: a large mask may differ in one element alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.bucket.hashing import fingerprint
from trainer.checkpoint.shards import is_cut
from trainer.checkpoint.state import OWN, State, StateError
from trainer.ranks.group import RankGroup

COLUMNS = 8191
"""The number of sums that represent a tensor on a device; a prime, because rows often have a power of two."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Kind:
    """Something that each rank may have for itself."""

    title: str
    key: str
    """Its plain values in state.json."""
    prefix: str
    """The prefix of its tensors."""
    values: str
    """The end of the name of a rank's own plain values, after `own.<rank>`.

    Where it is not empty, state.json holds none then: a release that does not know them refuses the checkpoint, rather
    than give each rank the first rank's.
    """

    def has(self, name: str) -> bool:
        """Whether a tensor is of this kind."""
        return name.startswith(self.prefix)


KINDS = (
    Kind("extra", "extra", "extra.", values=""),
    Kind("get_extra_state", "modules", "module.", values=".modules"),
)


def refuse_other_names(group: RankGroup, names: Iterable[str], check_stop: Callable[[], None]) -> None:
    """Refuse extras whose names differ between the ranks.

    Raises:
        StateError: the names differ.
    """
    registered = group.gather("extras", sorted(names), check_stop)
    for rank, theirs in enumerate(registered):
        if theirs != registered[0]:
            raise StateError(
                f"extra: rank 0 registers {', '.join(registered[0]) or 'nothing'}, rank {rank} "
                f"{', '.join(theirs) or 'nothing'}: register the same names on every rank"
            )


def split(group: RankGroup, state: State) -> tuple[State, dict[str, torch.Tensor]]:
    """(the state that all ranks share, this rank's own part on the host). Every rank calls it."""
    own = dict(state.own)
    if group.world_size > 1:
        for kind in KINDS:
            if state.plain.get(kind.key, {}).get("dict"):
                state, mine = _split_kind(group, state, kind)
                own |= mine
    return state, own


def _split_kind(group: RankGroup, state: State, kind: Kind) -> tuple[State, dict[str, torch.Tensor]]:
    names = [name for name in state.tensors if kind.has(name)]
    form = fingerprint(*(f"{name}{state.tensors[name].dtype}{tuple(state.tensors[name].shape)}" for name in names))
    values = json.dumps(state.plain[kind.key])
    rows = group.exchange([form, fingerprint(values)]).wait()
    own = {}
    if any(row[1] != rows[0][1] for row in rows):
        own[f"{OWN}{group.rank}{kind.values}"] = torch.frombuffer(bytearray(values.encode("ascii")), dtype=torch.uint8)
        if kind.values:
            state = replace(state, plain={**state.plain, kind.key: {"own": kind.key}})
    differing = set(names)
    if names and all(row[0] == rows[0][0] for row in rows):
        rows = group.exchange(digests([state.tensors[name] for name in names])).wait()
        differing = {name for at, name in enumerate(names) if any(row[at] != rows[0][at] for row in rows)}
    for name in sorted(differing):
        own[f"{OWN}{group.rank}.{name}"] = state.tensors[name].detach().to("cpu", copy=True).contiguous()
    shared = {name: tensor for name, tensor in state.tensors.items() if name not in differing}
    return replace(state, tensors=shared), own


def digests(tensors: Sequence[torch.Tensor]) -> list[int]:
    """A fingerprint of each tensor's contents; 0 for a tensor that is cut over the ranks."""
    sums = {
        at: _sums(_integers(tensor))  # All start before the first is waited for.
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
    return flat.numpy().data.cast("B")


def _sums(flat: torch.Tensor) -> torch.Tensor:
    """Sums of integers down the columns of a table, filled row by row; the rest of the last row as it is."""
    whole = flat.numel() // COLUMNS * COLUMNS
    return torch.cat([flat[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64), flat[whole:].to(torch.int64)])


def joined(
    tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], rank: int, ranks: int, ranks_then: object
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """The reverse of `split` for this rank: (tensors, plain values, what is the first rank's instead of its own).

    Raises:
        StateError: the values cannot be read.
    """
    first = ranks != ranks_then
    prefix = f"{OWN}{0 if first else rank}"
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(OWN)}
    mine = {name: tensor for name, tensor in tensors.items() if name == prefix or name.startswith(f"{prefix}.")}
    plain = dict(plain)
    if isinstance(strides := plain.get("strides"), Mapping):  # The first rank's; others may differ.
        plain["strides"] = {name: value for name, value in strides.items() if f"{prefix}.{name}" not in mine}
    of_first = []
    for kind in KINDS:
        values = mine.get(f"{prefix}{kind.values}")
        own = {name[len(prefix) + 1 :]: tensor for name, tensor in mine.items()}
        own = {name: tensor for name, tensor in own.items() if kind.has(name)}
        found |= own
        if values is not None:
            try:
                plain[kind.key] = json.loads(bytes(values.numpy()))
            except ValueError as error:
                raise StateError(f"{prefix}{kind.values} holds no values ({error})") from None
        if first and (own or values is not None):
            of_first.append(kind.title)
    return found, plain, of_first
