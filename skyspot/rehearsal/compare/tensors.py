"""Comparing files of tensors, in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from skyspot.rehearsal.compare.difference import MISSING, Difference
from skyspot.rehearsal.compare.elements import Gaps, element_size, is_integer, numbers
from skyspot.rehearsal.compare.rules import Comparison, Findings, FormatError, Key, dotted, short
from skyspot.rehearsal.compare.values import compare_values

PIECE = 1 << 20
"""Bytes; a multiple of every element's size."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    dtype: str
    """As torch and numpy name it: `float32`."""
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]
    """Reads its bytes, PIECE at a time."""
    order: str = "<"
    """The byte order, `<` or `>`."""
    fortran: bool = False
    """True if the first index changes fastest."""

    def __str__(self) -> str:
        layout = f"{', big-endian' if self.order == '>' else ''}{', Fortran order' if self.fortran else ''}"
        return f"{self.dtype} {list(self.shape)}{layout}"


Entry = tuple[tuple[Key, ...], Any]
"""A path, and the Tensor or other value there. Entries come in the order of their names."""


def pieces_of(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    """Read so many bytes, PIECE at a time.

    Raises:
        FormatError: the file is too short.
    """
    while size:
        data = read(min(size, PIECE))
        if len(data) < min(size, PIECE):
            raise FormatError("a tensor is cut off")
        size -= len(data)
        yield data


def compare_entries(
    left: Sequence[Entry], right: Sequence[Entry], rules: Comparison, findings: Findings
) -> Difference | None:
    """Find the first difference between the tensors and values of two files."""
    sides = [[entry for entry in entries if not findings.ignores(entry[0], rules)] for entries in (left, right)]
    one, two = (dict(entries) for entries in sides)
    for path in [*one, *two]:
        if path not in one or path not in two:
            shown = [_summary(side[path]) if path in side else MISSING for side in (one, two)]
            return Difference(_named(path, one.get(path, two.get(path))), *shown)
    for path, before in one.items():
        after = two[path]
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            found = _compare_tensors(path, before, after, rules, findings)
        elif isinstance(before, Tensor) or isinstance(after, Tensor):
            found = Difference(_named(path, before), _summary(before), _summary(after))
        else:
            found = compare_values(before, after, path, rules, findings)
        if found:
            return found
    return None


def _compare_tensors(
    path: Sequence[Key], before: Tensor, after: Tensor, rules: Comparison, findings: Findings
) -> Difference | None:
    name, gaps = _named(path, before), Gaps()
    if str(before) != str(after):
        return Difference(name, str(before), str(after))
    size = element_size(before.dtype)
    tolerance = 0.0 if is_integer(before.dtype) else rules.tolerance or 0.0
    for one, two in zip(before.pieces(), after.pieces(), strict=True):
        if one == two or size is None:
            if one != two:
                at = next(n for n, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
                here, there = (f"0x{data[at : at + 8].hex()}" for data in (one, two))
                return Difference(name, here, there, before.dtype)
            gaps.count += len(one) // (size or 1)
        else:
            gaps.add(numbers(before.dtype, before.order, one), numbers(before.dtype, before.order, two), tolerance)
    if not gaps.outside:
        findings.record(gaps.largest, dotted(path))
        return None
    many = f"{gaps.differing} of {gaps.count} elements differ"
    if tolerance:
        many += f", {gaps.outside} by more than the tolerance"
    largest = "inf or NaN" if gaps.largest_outside == math.inf else short(gaps.largest_outside, 2)
    where = f"{name} at {list(_index(gaps.at, before))}"
    left, right = map(repr, gaps.values)
    return Difference(where, left, right, f"greatest difference {largest}; {many}")


def _index(at: int, tensor: Tensor) -> tuple[int, ...]:
    """The indices of the element that is so many elements into the tensor."""
    if tensor.dtype.startswith("complex"):
        at //= 2
    found = []
    for length in tensor.shape if tensor.fortran else reversed(tensor.shape):
        at, index = divmod(at, length)
        found.append(index)
    return tuple(found if tensor.fortran else reversed(found))


def _named(path: Sequence[Key], value: Any) -> str:
    kind = "tensor" if isinstance(value, Tensor) else "key"
    return f"{kind} {dotted(path)}" if path else "its array"


def _summary(value: Any) -> str:
    return str(value) if isinstance(value, Tensor) else repr(value)
