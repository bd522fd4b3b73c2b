"""Comparing the elements of two tensors, given as bytes."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass

_INTEGERS = {
    "bool": "?", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "int64": "q",
    "uint64": "Q",
}  # fmt: skip
_FLOATS = {"float16": "e", "float32": "f", "float64": "d", "complex64": "f", "complex128": "d"}
_UPPER_HALVES = {"bfloat16": ("f", 4), "float8_e5m2": ("e", 2)}
"""Formats that are the upper bytes of another one: its code and size in bytes."""


@dataclass
class Gaps:
    """The differences between the elements seen so far."""

    count: int = 0
    """Elements compared. A complex number counts as two."""
    differing: int = 0
    outside: int = 0
    """Those outside the tolerance."""
    largest: float = 0.0
    """The largest difference; infinite where a number stands against NaN."""
    largest_outside: float = 0.0
    """The largest one outside the tolerance."""
    at: int = 0
    """Its index."""
    values: tuple[float, float] = (0.0, 0.0)

    def add(self, left: Sequence[float], right: Sequence[float], tolerance: float) -> None:
        """Compare the next elements. `tolerance` is relative and absolute; left is the undisturbed run's."""
        gaps: Sequence[float] = list(map(abs, map(operator.sub, left, right)))
        if not math.isfinite(sum(gaps)):  # NaN or infinity is among them.
            gaps = [
                0.0 if one == two or (one != one and two != two) else math.inf if gap != gap else gap
                for one, two, gap in zip(left, right, gaps, strict=True)
            ]
        largest = max(gaps, default=0.0)
        self.largest = max(self.largest, largest)
        if largest > tolerance:
            pairs = enumerate(zip(left, gaps, strict=True))
            outside = [n for n, (one, gap) in pairs if gap == math.inf or gap > tolerance + tolerance * abs(one)]
            self.outside += len(outside)
            at = max(outside, key=gaps.__getitem__, default=None)
            if at is not None and gaps[at] > self.largest_outside:
                self.largest_outside, self.at, self.values = gaps[at], self.count + at, (left[at], right[at])
        self.differing += len(gaps) - gaps.count(0)
        self.count += len(gaps)


def is_integer(dtype: str) -> bool:
    """True if numbers of this type must be equal whatever the tolerance."""
    return dtype in _INTEGERS


def element_size(dtype: str) -> int | None:
    """Bytes of one number; None for an unknown type."""
    if dtype in _UPPER_HALVES:
        return _UPPER_HALVES[dtype][1] // 2
    if dtype == "float8_e4m3fn":
        return 1
    code = _INTEGERS.get(dtype) or _FLOATS.get(dtype)
    return struct.calcsize(f"<{code}") if code else None


def numbers(dtype: str, order: str, data: bytes) -> Sequence[float]:
    """Decode elements of a known type. `order` is `<` or `>`."""
    if dtype == "float8_e4m3fn":
        return [_E4M3[byte] for byte in data]
    if dtype in _UPPER_HALVES:
        code, size = _UPPER_HALVES[dtype]
        half = size // 2
        wide = bytearray(len(data) * 2)
        for n in range(half):
            wide[(half + n) :: size] = data[n::half] if order == "<" else data[half - 1 - n :: half]
        return struct.unpack(f"<{len(data) // half}{code}", wide)
    code = _INTEGERS.get(dtype) or _FLOATS[dtype]
    return struct.unpack(f"{order}{len(data) // struct.calcsize(f'<{code}')}{code}", data)


def _e4m3(byte: int) -> float:
    """Decode a float8 of 4 bits of exponent, which has no infinity."""
    sign, exponent, fraction = (-1.0 if byte & 0x80 else 1.0), byte >> 3 & 0xF, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (math.ldexp(fraction, -9) if not exponent else math.ldexp(8 + fraction, exponent - 10))


_E4M3 = [_e4m3(byte) for byte in range(256)]
