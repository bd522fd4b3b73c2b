"""What of a user's extras is not the same on every rank: it is each rank's own, and saved beside what all share.

Compared at each save: values whole, tensors by their bytes, large ones by a sample of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from trainer.hashing import fingerprint
from trainer.shards import is_cut
from trainer.state import OWN, State, StateError
from trainer.together import Together

EXTRA = "extra."
"""What the names of the extras' tensors begin with."""
SAMPLE = 8192
"""Elements by which a tensor is compared that has more than twice as many."""


def refuse_other_names(together: Together, names: Iterable[str], between: Callable[[], None]) -> None:
    """See that all ranks have registered extras of the same names.

    Raises:
        StateError: they have not.
    """
    told = together.gather("extras", sorted(names), between)
    for rank, theirs in enumerate(told):
        if theirs != told[0]:
            raise StateError(
                f"extra: rank 0 registers {', '.join(told[0]) or 'nothing'}, rank {rank} "
                f"{', '.join(theirs) or 'nothing'}: register the same names on every rank"
            )


def split(together: Together, state: State) -> tuple[State, dict[str, torch.Tensor]]:
    """(the state that all ranks share, copies on the host of what is this rank's own). Every rank calls it."""
    if together.world_size == 1 or not state.plain["extra"]["dict"]:
        return state, {}
    names = [name for name in state.tensors if name.startswith(EXTRA)]
    form = fingerprint(*(f"{name}{state.tensors[name].dtype}{tuple(state.tensors[name].shape)}" for name in names))
    values = json.dumps(state.plain["extra"])
    rows = together.exchange([form, fingerprint(values)]).wait()
    own = {}
    if any(row[1] != rows[0][1] for row in rows):
        own[f"{OWN}{together.rank}"] = torch.frombuffer(bytearray(values.encode("ascii")), dtype=torch.uint8)
    differing = names
    if names and all(row[0] == rows[0][0] for row in rows):
        told = together.exchange(_digests([state.tensors[name] for name in names])).wait()
        differing = [name for at, name in enumerate(names) if any(row[at] != told[0][at] for row in told)]
    for name in differing:
        own[f"{OWN}{together.rank}.{name}"] = state.tensors[name].detach().to("cpu", copy=True).contiguous()
    return replace(state, tensors={k: v for k, v in state.tensors.items() if k not in set(differing)}), own


def _digests(tensors: list[torch.Tensor]) -> list[int]:
    """A fingerprint of each tensor's contents; of one that is cut over the ranks, 0."""
    samples: dict[torch.device, list[torch.Tensor]] = {}
    found = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1) if not is_cut(tensor) else torch.empty(0)
        step = max(1, flat.numel() // SAMPLE)
        piece = flat[::step].contiguous().view(torch.uint8)
        here = samples.setdefault(piece.device, [])
        found.append((piece.device, len(here)))
        here.append(piece)
    # One transfer a device.
    data = {device: torch.cat(pieces).cpu().numpy().tobytes() for device, pieces in samples.items()}
    spans: dict[torch.device, list[bytes]] = {}
    for device, pieces in samples.items():
        at = 0
        for piece in pieces:
            spans.setdefault(device, []).append(data[device][at : at + piece.numel()])
            at += piece.numel()
    return [fingerprint(spans[device][index]) for device, index in found]


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
