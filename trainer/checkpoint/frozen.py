"""Frozen parameters of a pretrained base, which every attempt loads anew: a checkpoint has their hashes alone.

A parameter is left out while it needs no gradient, belongs to a module that `from_pretrained` has made, and has the
contents with which the attempt began. One that is trained later, or that is changed without gradients (a teacher that
follows its student), is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.bucket.hashing import hash_bytes
from trainer.checkpoint.names import parameters, unwrap
from trainer.checkpoint.shards import is_cut
from trainer.checkpoint.values import StateError
from trainer.checkpoint.writing import bytes_of

_WORD = 8
"""Bytes that a checksum adds up as one integer."""


class Frozen:
    """The frozen parameters of a model's bases, as the attempt began with them."""

    def __init__(self, model: nn.Module, earlier: Frozen | None = None) -> None:
        """Look at a model before anything is restored into it.

        Args:
            model: The model.
            earlier: What was seen of the parts of it that have been restored already.
        """
        self._model, named = model, parameters(model)
        self._seen: set[str] = named.keys() | (earlier._seen if earlier else set())
        self.bases, ids = _bases(unwrap(model))
        """Names or folders of the pretrained models."""
        self._sums: dict[str, int] = {
            name: _checksum(parameter)
            for name, parameter in named.items()
            if id(parameter) in ids and not parameter.requires_grad and _is_here(parameter)
            if earlier is None or name not in earlier._seen
        } | (earlier._sums if earlier else {})
        self._hashes: dict[str, str] = {}

    def left_out(self, named: Mapping[str, nn.Parameter]) -> set[str]:
        """Names of the parameters that a checkpoint of this moment does without."""
        return {name for name in self._sums if name in named and self._is_unchanged(name, named[name])}

    def describe(self, names: set[str], named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """What state.json holds of parameters that are left out."""
        for name in names - self._hashes.keys():
            self._hashes[name] = _hash(named[name])
        return {"bases": self.bases, "hashes": {name: self._hashes[name] for name in sorted(names)}}

    @property
    def line(self) -> str:
        """A line that says what is left out; empty if nothing is."""
        if not self._sums:
            return ""
        named = parameters(self._model)
        count = sum(named[name].nbytes for name in self._sums) / 1e6
        return (
            f"Not saved: {count:,.1f} MB of frozen parameters of {', '.join(self.bases)}. Each attempt loads them "
            "again, and compares their hashes"
        )

    def _is_unchanged(self, name: str, parameter: nn.Parameter) -> bool:
        return not parameter.requires_grad and _checksum(parameter) == self._sums[name]


def check(named: Mapping[str, nn.Parameter], missing: set[str], described: Any) -> None:
    """Check parameters that a checkpoint was saved without: the model must have the same.

    Args:
        named: The model's parameters.
        missing: Names of those that the checkpoint lacks.
        described: What its state.json holds of them.

    Raises:
        StateError: one has other contents, or none that the checkpoint knows.
    """
    hashes = described.get("hashes") if isinstance(described, Mapping) else None
    hashes = hashes if isinstance(hashes, Mapping) else {}
    for name in sorted(missing):
        if name not in hashes:
            raise StateError(f"model.{name} is not in the checkpoint")
        if _hash(named[name]) != hashes[name]:
            raise StateError(
                f"model.{name} is frozen and not in the checkpoint, and differs from the one that this run began with, "
                f"of {', '.join(map(str, described.get('bases', [])))}. Load the same model in the same type and "
                "revision; if the program draws a part of it at random, seed it first (torch.manual_seed)"
            )


def _bases(model: nn.Module) -> tuple[list[str], set[int]]:
    """(names of the pretrained models in a model, ids of their parameters)."""
    names: dict[str, None] = {}
    ids: set[int] = set()
    adapters: set[int] = set()
    for module in model.modules():
        name = getattr(getattr(module, "config", None), "_name_or_path", None)
        if isinstance(name, str) and name:
            names[name] = None
            ids |= {id(parameter) for parameter in module.parameters()}
        # PEFT puts adapters, which are drawn at random, among the base's modules.
        for attribute in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, attribute, None)
            if isinstance(part, nn.Module):
                adapters |= {id(parameter) for parameter in part.parameters()}
    return list(names), ids - adapters


def _is_here(parameter: torch.Tensor) -> bool:
    return not is_cut(parameter) and parameter.device.type != "meta"


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _checksum(tensor: torch.Tensor) -> int:
    """A sum over all bytes, made on the tensor's device; it differs after any update of the values."""
    flat = _flat(tensor)
    whole = flat.numel() // _WORD * _WORD
    if flat.storage_offset() % _WORD:
        flat = flat.clone()
    words, rest = flat[:whole].view(torch.int64), flat[whole:]
    return int(words.sum() + rest.sum(dtype=torch.int64))


def _hash(tensor: torch.Tensor) -> str:
    data = bytes_of(tensor.detach().to("cpu").contiguous())
    return f"{tensor.dtype} {list(tensor.shape)} {hash_bytes(data.data)}"
