"""Typed values: how a value of each known type is made of simpler ones, and made again from them.

Nothing is executed or imported: a class that a checkpoint names must be loaded by the program, and no `__init__` runs.
Types in none of these forms are refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import pathlib
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

_DTYPE = re.compile(r"[<>=|][biufcmMUS]\d+(\[\w+\])?")
_FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set)} | {"None": None}
_PATHS = (pathlib.PosixPath, pathlib.WindowsPath)


@dataclass(frozen=True)
class Form:
    """How the values of a type are written."""

    fits: Callable[[Any], bool]
    """True for a value that has this form."""
    parts: Callable[[Any], Any]
    """The simpler values that a value is made of.

    Raises ValueError where the value cannot be made again; the message says why.
    """
    made: Callable[[Any], Any]
    """The value again. Raises ValueError, TypeError or another usual error where the parts are none of this form."""


def _exactly(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


# -- classes of the program --------------------------------------------------------------------------------------------


def _place(kind: type) -> str:
    """Where a class is found again: its module and its name there.

    Raises:
        ValueError: a class made within a function is not found again.
    """
    place = f"{kind.__module__}:{kind.__qualname__}"
    if _look(place) is not kind:
        raise ValueError(f"its class {kind.__qualname__} is not at the top level of a module; define it there")
    return place


def _look(place: str) -> object:
    """The loaded class at a place; None if there is none. No attribute is computed, and no module imported."""
    module, _, name = place.partition(":")
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _class_at(place: str, fits: Callable[[type], bool]) -> Any:
    found = _look(place)
    if not isinstance(found, type) or not fits(found):
        raise ValueError(f"{place} is not a class here; import or define it before run.register()")
    return found


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple)


def _named_tuple(parts: Any) -> Any:
    place, items = parts
    kind = _class_at(place, _is_namedtuple)
    if len(kind._fields) != len(items):
        raise ValueError(f"{place} has {len(kind._fields)} fields here, {len(items)} in the checkpoint")
    return tuple.__new__(kind, items)


def _dataclass_parts(value: Any) -> list[Any]:
    fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return [_place(type(value)), fields | getattr(value, "__dict__", {})]


def _dataclass(parts: Any) -> Any:
    place, values = parts
    kind = _class_at(place, dataclasses.is_dataclass)
    if missing := [item.name for item in dataclasses.fields(kind) if item.name not in values]:
        raise ValueError(f"{place} has the field {missing[0]!r} here, which is not in the checkpoint")
    value = object.__new__(kind)
    for name, one in values.items():
        object.__setattr__(value, name, one)  # A frozen one too.
    return value


def _enum_parts(value: enum.Enum) -> list[Any]:
    is_member = type(value).__members__.get(value.name or "") is value
    return [_place(type(value)), value.name if is_member else {"flags": value.value}]


def _enum(parts: Any) -> Any:
    place, member = parts
    kind = _class_at(place, lambda found: issubclass(found, enum.Enum))
    if isinstance(member, str):
        if member not in kind.__members__:
            raise ValueError(f"{place} has no member {member} here")
        return kind.__members__[member]
    if not issubclass(kind, enum.Flag):
        raise ValueError(f"{place} is not a Flag here")
    return kind(member["flags"])


# -- numpy and torch ---------------------------------------------------------------------------------------------------


def _dtype_name(dtype: np.dtype[Any]) -> str:
    if not _DTYPE.fullmatch(dtype.str):
        raise ValueError(f"its dtype {dtype} has no bytes to save; use numbers, text or times")
    return dtype.str


def _dtype(name: Any) -> np.dtype[Any]:
    if not _DTYPE.fullmatch(name):
        raise ValueError(f"{name[:40]!r} is not a dtype")
    found: np.dtype[Any] = np.dtype(name)
    return found


def _array_parts(value: np.ndarray[Any, Any]) -> list[Any]:
    order: Literal["C", "F"] = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    name, flat = _dtype_name(value.dtype), value.ravel(order)  # No copy if it lies so in memory.
    flat = flat if flat.flags.writeable else flat.copy()
    return [name, list(value.shape), order, torch.from_numpy(flat.view(np.uint8))]


def _array(parts: Any) -> np.ndarray[Any, Any]:
    dtype, shape, order, flat = parts
    return np.frombuffer(flat.cpu().numpy().tobytes(), _dtype(dtype)).reshape(shape, order=order).copy(order=order)


def _scalar(parts: Any) -> Any:
    name, digits = parts
    dtype = _dtype(name)
    return np.frombuffer(bytes.fromhex(digits), dtype)[0] if dtype.itemsize else dtype.type()


def _torch_dtype(name: Any) -> torch.dtype:
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {name}")
    return found


# -- Python's own ------------------------------------------------------------------------------------------------------


def _in_order(value: Any) -> list[Any]:
    """The items of a set in the same order on every rank."""
    if any(isinstance(item, torch.Tensor) for item in value):
        raise ValueError("tensors in it cannot be found again; use a list")
    return sorted(value, key=lambda item: (type(item).__name__, repr(item)))


def _time_text(value: Any) -> str:
    zone = getattr(value, "tzinfo", None)
    if zone is not None and type(zone) is not datetime.timezone:
        raise ValueError(f"its time zone is a {type(zone).__name__}; use datetime.timezone.utc")
    return str(value.isoformat())


def _factory_name(value: Any) -> list[Any]:
    for name, factory in _FACTORIES.items():
        if value.default_factory is factory:
            return [name, dict(value)]
    raise ValueError(f"its default_factory is none of {', '.join(_FACTORIES)}")


FORMS: dict[str, Form] = {
    "numpy": Form(
        lambda value: isinstance(value, np.generic),
        lambda value: [_dtype_name(value.dtype), value.tobytes().hex()],
        _scalar,
    ),
    "array": Form(_exactly(np.ndarray), _array_parts, _array),
    "enum": Form(lambda value: isinstance(value, enum.Enum), _enum_parts, _enum),
    "set": Form(_exactly(set), _in_order, set),
    "frozenset": Form(_exactly(frozenset), _in_order, frozenset),
    "deque": Form(
        _exactly(deque), lambda value: [list(value), value.maxlen], lambda parts: deque(parts[0], maxlen=parts[1])
    ),
    "ordered": Form(_exactly(OrderedDict), dict, OrderedDict),
    "counter": Form(_exactly(Counter), dict, Counter),
    "default": Form(_exactly(defaultdict), _factory_name, lambda parts: defaultdict(_FACTORIES[parts[0]], parts[1])),
    "path": Form(_exactly(*_PATHS), str, pathlib.Path),
    "complex": Form(_exactly(complex), lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "range": Form(
        _exactly(range), lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)
    ),
    "datetime": Form(_exactly(datetime.datetime), _time_text, datetime.datetime.fromisoformat),
    "date": Form(_exactly(datetime.date), _time_text, datetime.date.fromisoformat),
    "timedelta": Form(
        _exactly(datetime.timedelta),
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
    "size": Form(_exactly(torch.Size), list, torch.Size),
    "dtype": Form(_exactly(torch.dtype), lambda value: str(value).removeprefix("torch."), _torch_dtype),
    "device": Form(_exactly(torch.device), str, torch.device),
    "namedtuple": Form(
        lambda value: _is_namedtuple(type(value)), lambda value: [_place(type(value)), list(value)], _named_tuple
    ),
    "dataclass": Form(
        lambda value: dataclasses.is_dataclass(value) and not isinstance(value, type), _dataclass_parts, _dataclass
    ),
}  # fmt: skip
"""All forms, by their tag in state.json."""


def form_of(value: Any) -> str | None:
    """The tag of a value's form; None if it has none."""
    return next((tag for tag, form in FORMS.items() if form.fits(value)), None)
