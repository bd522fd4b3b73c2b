"""Values of Python's, numpy's and torch's types come out of a checkpoint as they went in, or are refused in a line."""

from __future__ import annotations

import collections
import datetime
import enum
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint.typed import FORMS
from trainer.checkpoint.values import StateError, decode, encode


class Color(enum.Enum):
    RED = (1, 2)


class Level(enum.IntEnum):
    LOW = 1


class Name(str, enum.Enum):
    ANNA = "anna"


class Mask(enum.Flag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: float
    y: Any


@dataclass(frozen=True)
class Best:
    loss: float
    where: Path = Path("a")
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        assert isinstance(self.loss, torch.Tensor) or self.loss < 100, "no value is made by its class's own code"


@dataclass
class Slotted:
    __slots__ = ("count",)
    count: int


UTC = datetime.timezone.utc
VALUES = {
    "numpy scalars": [np.float32(0.1), np.float64(0.1), np.int64(-3), np.bool_(True), np.uint16(7), np.complex64(1j)],
    "numpy text": [np.str_("é"), np.str_(""), np.bytes_(b"ab"), np.datetime64("2020-01-01", "ns")],
    "not finite": [np.float32("inf"), np.float64("-inf"), complex("inf+0j")],
    "arrays": [np.arange(6, dtype="<f4").reshape(2, 3), np.zeros((0, 3)), np.array(3), np.array(["a", "bc"])],
    "orders": [np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(10)[::3], np.arange(3, dtype=">i4")],
    "sets": [{1, "a", (2, "b"), None, b"x"}, frozenset({1}), set(), {frozenset({2})}],
    "deques": [collections.deque([1, [2]], maxlen=5), collections.deque("ab")],
    "enums": [Color.RED, Level.LOW, Name.ANNA, Mask.A, Mask.A | Mask.B, {Color.RED: 1}],
    "tuples": [Point(1.0, [2]), (Point(0.5, None),), torch.Size([2, 3])],
    "dataclasses": [Best(0.5, Path("/x/y"), {1}), Slotted(3), [Best(1.0)]],
    "dicts": [
        collections.OrderedDict(b=1, a=2), collections.Counter("aab"), collections.defaultdict(list, a=[1]),
        collections.defaultdict(None, a=1),
    ],
    "times": [
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.datetime(2026, 1, 2, tzinfo=UTC), datetime.date(2026, 1, 2),
        datetime.timedelta(-1, 5, 7), datetime.datetime.now(datetime.timezone(datetime.timedelta(hours=2))),
    ],
    "more": [Path("a/b"), 1 + 2j, range(1, 9, 2), torch.float16, torch.device("cpu"), torch.device("cuda", 1)],
}  # fmt: skip


def there_and_back(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(encode(value, "extra", tensors), allow_nan=False))
    return decode(plain, {name: tensor.clone() for name, tensor in tensors.items()})


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        order = one.flags.f_contiguous == other.flags.f_contiguous or not one.flags.forc
        alike = (one.dtype, one.shape) == (other.dtype, other.shape) and order
        return alike and other.flags.writeable and bool((one == other).all())
    return bool(one == other)


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_comes_back_with_its_type(kind: str) -> None:
    for value in VALUES[kind]:
        assert same(value, there_and_back(value)), value
        if kind != "orders":
            assert same({"a": [value]}["a"][0], there_and_back({"a": [value]})["a"][0])


def test_a_deque_keeps_its_limit_and_a_defaultdict_its_factory() -> None:
    assert there_and_back(collections.deque([1], maxlen=5)).maxlen == 5
    assert there_and_back(collections.defaultdict(list))["new"] == []


def test_a_large_array_is_not_copied_before_the_save_copies_it() -> None:
    for array in (np.zeros((3, 4)), np.asfortranarray(np.zeros((3, 4)))):
        tensors: dict[str, torch.Tensor] = {}
        encode(array, "extra", tensors)
        assert tensors["extra.3"].data_ptr() == array.ctypes.data
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    assert same(fixed.copy(), there_and_back(fixed))


def test_tensors_within_come_back() -> None:
    back = there_and_back({"best": Best(torch.ones(2)), "last": collections.deque([torch.zeros(1)])})  # type: ignore[arg-type]
    assert torch.equal(back["best"].loss, torch.ones(2))
    assert torch.equal(back["last"][0], torch.zeros(1))


def test_a_set_is_written_in_one_order() -> None:
    """Ranks that have the same set must write the same, in whatever order it was filled."""
    filled = [set(items) for items in itertools.permutations([0, 8, 16, 24])]
    assert len({tuple(one) for one in filled}) > 1
    assert len({json.dumps(encode(one, "", {})) for one in filled}) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "extra.it: a object cannot be saved; use tensors, arrays, numbers"),
        (np.array([object()]), "extra.it: a ndarray cannot be saved: its dtype object has no bytes to save"),
        ({torch.ones(1)}, "extra.it: a set cannot be saved: tensors in it cannot be found again; use a list"),
        (collections.defaultdict(lambda: 1), "a defaultdict cannot be saved: its default_factory is none of int"),
        (enum.Enum("Local", "A").A, "a Local cannot be saved: its class Local is not at the top level of a module"),
        (np.ma.array([1.0]), "extra.it: a MaskedArray cannot be saved"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_made_again_is_refused_in_a_line(value: Any, said: str) -> None:
    with pytest.raises(StateError) as refused:
        encode({"it": value}, "extra", {})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_class_that_is_not_there_or_has_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [encode(value, "", {}) for value in (Color.RED, Best(0.5), Point(1, 2))]
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "Color", enum.Enum("Color", "BLUE", module=__name__))
    with pytest.raises(StateError, match="test_typed:Color has no member RED here"):
        decode(plain[0], {})
    monkeypatch.setattr(this, "Point", collections.namedtuple("Point", "x"))
    with pytest.raises(StateError, match="test_typed:Point has 1 fields here, 2 in the checkpoint"):
        decode(plain[2], {})
    monkeypatch.delattr(this, "Best")
    with pytest.raises(StateError, match="test_typed:Best is not a class here; import or define it before"):
        decode(plain[1], {})


def test_no_module_is_imported_and_no_code_of_a_class_runs() -> None:
    assert "antigravity" not in sys.modules
    with pytest.raises(StateError, match="not a class here"):
        decode({"enum": ["antigravity:Thing", "A"]}, {})
    assert "antigravity" not in sys.modules
    over = encode(Best(0.5), "", {})
    over["dataclass"][1]["dict"][0][1] = 200.0
    assert decode(over, {}).loss == 200.0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*FORMS, "dict", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(FORMS)), json_values)
def test_whatever_state_json_holds_is_decoded_or_refused(tag: str, inner: Any) -> None:
    try:
        decode({tag: inner}, {})
    except StateError as error:
        assert "state.json" in str(error)
