"""Values: plain values as JSON with tagged types, and the tensors among them by name. Nothing is ever pickled.

Numbers, text, bytes, tensors, lists, tuples and dicts are written here; values of further types are made of these
(typed.py). A release that does not know a type refuses the checkpoint.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trainer.checkpoint import typed
from trainer.errors import TrainerError


class StateError(TrainerError):
    """A state cannot be saved, or does not fit the model that it is loaded into."""


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON with tagged types; its tensors are put into `tensors` under their paths.

    Raises:
        StateError: a value in it is neither plain nor a tensor.
    """
    if isinstance(value, (torch.Tensor, bytes)) and not isinstance(value, np.generic):
        while path in tensors:  # The keys 1 and "1" give the same path.
            path += "'"
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {"tensor": path}
        tensors[path] = torch.from_numpy(np.array(bytearray(value), dtype=np.uint8))
        return {"bytes": path}
    if type(value) is io.BytesIO:
        return {"file": [encode(value.getvalue(), path, tensors), value.tell()]}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is list:
        return [encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if type(value) is not dict and (tag := typed.form_of(value)):
        return {tag: encode(_parts(value, typed.FORMS[tag], path), path, tensors)}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, torch.Tensor):
                raise StateError(f"{path}: a key that is a tensor cannot be saved; use names or numbers")
        pairs = [
            [encode(key, f"{path}.key", tensors), encode(item, f"{path}.{key}", tensors)] for key, item in value.items()
        ]
        return {"dict": pairs}
    raise StateError(
        f"{path}: a {type(value).__name__} cannot be saved; use tensors, arrays, numbers, text, bytes, lists, dicts, "
        "sets or dataclasses"
    )


def _parts(value: Any, form: typed.Form, path: str) -> Any:
    try:
        return form.parts(value)
    except ValueError as error:
        raise StateError(f"{path}: a {type(value).__name__} cannot be saved: {error}") from None


def is_plain(value: Any) -> bool:
    """True if `encode` takes a value, and it is no tensor."""
    try:
        encode(value, "", {})
    except StateError:
        return False
    return not isinstance(value, torch.Tensor)


def tensors_of(value: Any) -> set[str]:
    """Names of the tensors in an encoded value."""
    found, left = set(), [value]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left.extend(one)
        elif isinstance(one, dict):
            if isinstance(name := one.get("tensor", one.get("bytes")), str):
                found.add(name)
            left.extend(one.values())
    return found


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `encode` was given.

    Raises:
        StateError: `encode` did not make this.
    """
    try:
        return _decode(value, tensors)
    except (RecursionError, TypeError) as error:
        raise StateError(f"state.json holds a value that cannot be decoded ({error})") from None


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        if tag == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if tag == "tuple" and isinstance(inner, list):
            return tuple(_decode(item, tensors) for item in inner)
        if tag == "dict" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
            return {_decode(key, tensors): _decode(item, tensors) for key, item in inner}
        if tag == "tensor" and inner in tensors:
            return tensors[inner]
        if tag in typed.FORMS:
            return _made(tag, _decode(inner, tensors))
        if tag == "file" and isinstance(inner, list) and len(inner) == 2:
            return _file(_decode(inner[0], tensors), inner[1])
        if tag == "bytes" and inner in tensors and tensors[inner].dtype == torch.uint8:
            return tensors[inner].cpu().numpy().tobytes()
    raise StateError("state.json holds a value of an unknown type")


def _made(tag: str, parts: Any) -> Any:
    try:
        return typed.FORMS[tag].made(parts)
    except (ValueError, KeyError, AttributeError, OverflowError, RuntimeError, IndexError) as error:
        raise StateError(f"state.json holds a {tag} that cannot be made again: {error}") from None


def _file(content: Any, position: Any) -> io.BytesIO:
    if not isinstance(content, bytes) or type(position) is not int or position < 0:
        raise StateError("state.json holds a file in memory that is malformed")
    found = io.BytesIO(content)
    found.seek(position)
    return found
