"""Comparing results: what is equal, what differs, and that a difference can be seen."""

import csv
import json
import math
import re
import struct
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import PROGRAMS, clean_env
from support_rehearse import sees_reads

from skyspot.errors import UsageError
from skyspot.rehearsal import advice, remedies, verdict
from skyspot.rehearsal.compare import bytewise, command, repeated, torch_files
from skyspot.rehearsal.compare.control import Outcome, control
from skyspot.rehearsal.compare.difference import Sides
from skyspot.rehearsal.compare.elements import element_size, numbers
from skyspot.rehearsal.compare.files import compare_files
from skyspot.rehearsal.compare.rules import Comparison, Pattern
from skyspot.rehearsal.verdict import Verdict

PYTHON = sys.executable


@pytest.fixture(autouse=True)
def _warm_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that loads a torch file starts warm, except where its Python is under test."""
    if "python" not in request.node.name:
        started = types.SimpleNamespace(
            Popen=partial(warm.Popen, env=clean_env()), PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL
        )
        monkeypatch.setattr(torch_files, "subprocess", started)


def buckets(folder: Path, name: str, left: object, right: object) -> tuple[Path, Path]:
    """Two buckets with a file each: bytes, texts, or what a function writes to its path. None: no file."""
    found = []
    for side, content in (("left", left), ("right", right)):
        path = folder / side / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif callable(content):
            content(path)
        elif content is not None:
            path.write_text(json.dumps(content))
        found.append(folder / side)
    return found[0], found[1]


def compared(folder: Path, name: str, left: object, right: object, *globs: str, **rules: object) -> Verdict:
    one, two = buckets(folder, name, left, right)
    how = Comparison(tuple(Pattern(glob) for glob in globs or (name,)), **rules)  # type: ignore[arg-type]
    return compare_files(how, {None: one}, {None: two}, Sides())


def two_shown(text: str) -> tuple[str, str]:
    """The two sides of a difference."""
    found = re.search(r"differs in .*?: (.*) undisturbed, (.*) preempted", text, re.DOTALL)
    assert found, text
    return found[1], found[2]


def torch_saver(value: object, **options: object):
    return lambda path: torch.save(value, path, **options)


# -- byte for byte ---------------------------------------------------------------------------------------------------


def test_equal_files_are_counted_with_their_glob(tmp_path: Path) -> None:
    found = compared(tmp_path, "a.txt", "x", "x", "*.txt")
    assert (found.exact, found.text, found.notes) == (True, "byte-identical: 1 of 1 files (*.txt)", ())


@pytest.mark.parametrize(("left", "right", "side"), [(None, "x", "undisturbed"), ("x", None, "preempted")])
def test_a_missing_file_is_said_on_which_side(tmp_path: Path, left: object, right: object, side: str) -> None:
    found = compared(tmp_path, "r/a.txt", left, right, "r/*")
    assert found.text == f"NOT exact: r/a.txt is missing after the {side} run"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["r/a", "r/b"], "r/a and r/b are"),
        (["r/a", "r/b", "r/c"], "r/a, r/b and r/c are"),
        (["r/c-1.pt", "r/c-2.pt", "r/c-3.pt"], "r/c-1.pt (and 2 more like r/c-#.pt) are"),
        (["r/a", "r/c-1.pt", "r/c-2.pt"], "r/a and r/c-1.pt (and 1 more like r/c-#.pt) are"),
        ([f"r/{name}" for name in "abcdef"], "r/a, r/b, r/c and 3 more kinds of files are"),
    ],
)
def test_missing_files_are_named_by_their_kinds(tmp_path: Path, names: list[str], said: str) -> None:
    one, two = buckets(tmp_path, "r/z", "x", "y")
    for name in names:
        (one / name).write_text("x")
    found = compare_files(Comparison((Pattern("r/*"),)), {None: one}, {None: two}, Sides())
    assert found.text == f"NOT exact: {said} missing after the preempted run"


LONG = "x" * 299


@pytest.mark.parametrize(
    ("left", "right", "where"),
    [
        (f"one\n{LONG}a{LONG}\n", f"one\n{LONG}b{LONG}\n", "line 2, column 300"),
        ("one\nloss 0.5\n", "one\nloss 0.5  \n", "line 2, column 9"),
        ("one\ntwo\n", "one\r\ntwo\r\n", "line 1, column 4"),
        ("one\ntwo\n", "one\ntwo", "line 2, column 4"),
        ("one\ntwo", "one\n", "line 2, column 1"),
        ("", "x", "line 1, column 1"),
        ("a\tb", "a b", "line 1, column 2"),
        ("a\u00a0b", "a b", "line 1, column 2"),
        ("e\u0301t\u00e9", "\u00e9t\u00e9", "line 1, column 1"),
        ("ab\u200bc", "abc", "line 1, column 3"),
        ("a\\n", "a\n", "line 1, column 2"),
        ("\u4e2d" * 500 + "a", "\u4e2d" * 500 + "b", "line 1, column 501"),
        ("\u4e2d\u6587", "\u4e2d\u6588", "line 1, column 2"),
        ("a" * 100, "a" * 101, "line 1, column 101"),
        ("\r" * 50 + "a", "\r" * 50 + "b", "line 1, column 51"),
    ],
)
def test_texts_show_the_line_around_the_column_and_never_the_same_twice(
    tmp_path: Path, left: str, right: str, where: str
) -> None:
    found = compared(tmp_path, "out.log", left, right)
    assert not found.exact
    assert f"NOT exact: out.log differs in {where}: " in found.text
    one, two = two_shown(found.text)
    assert one != two
    assert len(found.text) < 600
    assert found.text.isprintable()


def test_the_end_of_a_file_is_said(tmp_path: Path) -> None:
    assert two_shown(compared(tmp_path, "a.txt", "one\ntwo\n", "one\ntwo").text) == ("'two\\n'", "'two' (end of file)")
    assert two_shown(compared(tmp_path, "a.txt", "x\n", "x\ny\n").text) == ("(end of file)", "'y\\n'")


@pytest.mark.parametrize(
    ("left", "right", "where"),
    [
        (b"ab\0c\n", b"abc\n", "byte 2: 0x00 undisturbed, 0x63 preempted"),
        (b"\x80\x05abc", b"\x80\x05abd", "byte 4: 0x63 undisturbed, 0x64 preempted"),
        (b"\xff" * 3_000_000, b"\xff" * 2_999_999, "byte 2999999: 0xff undisturbed, (missing) preempted"),
    ],
)
def test_binary_files_show_the_offset_and_both_bytes(tmp_path: Path, left: bytes, right: bytes, where: str) -> None:
    assert f"differs in {where}" in compared(tmp_path, "state.pkl", left, right).text


def test_a_line_is_counted_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"line {n} \u00e9\n" for n in range(1, 200)]
    changed = [*lines]
    changed[149] = changed[149].replace("150", "15O")
    for piece in (1, 3, 7, 64, 1 << 20):
        monkeypatch.setattr(bytewise, "PIECE", piece)
        found = compared(tmp_path, "a.txt", "".join(lines), "".join(changed))
        assert "line 150, column 8: 'line 150 \u00e9\\n' undisturbed, 'line 15O \u00e9\\n'" in found.text


ODD = [*'ab \n\r\t\0\\n1,"{}[]:;.e', "\u00e9", "\u0301", "\u200b", "\u2028"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["a.txt", "a.json", "a.jsonl", "a.csv", "a.tsv", "a.npz", "a.npy", "a.safetensors"]),
    start=st.lists(st.sampled_from(ODD), max_size=60), left=st.lists(st.sampled_from(ODD), max_size=3),
    right=st.lists(st.sampled_from(ODD), max_size=3), end=st.lists(st.sampled_from(ODD), max_size=60),
    tolerance=st.sampled_from([None, 0.0]),
)  # fmt: skip
def test_whatever_differs_can_be_seen(
    tmp_path_factory: pytest.TempPathFactory, name: str, start: list[str], left: list[str], right: list[str],
    end: list[str], tolerance: float | None,
) -> None:  # fmt: skip
    texts = ["".join([*start, *middle, *end]) for middle in (left, right)]
    found = compared(tmp_path_factory.getbasetemp() / "odd", name, *texts, tolerance=tolerance)
    if texts[0] == texts[1]:
        assert found.exact
    elif tolerance is None:
        assert not found.exact
    if not found.exact:
        one, two = two_shown(found.text)
        assert one != two
        assert found.text.isprintable()


# -- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "difference"),
    [
        ({"loss": 0.5}, {"loss": 0.6}, "key loss: 0.5 undisturbed, 0.6 preempted"),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, "key a[1].b: 2 undisturbed, 3 preempted"),
        ({"a": 1}, {"a": 1, "b": None}, "key b: (missing) undisturbed, null preempted"),
        ({"a": [1, 2]}, {"a": [1]}, "key a[1]: 2 undisturbed, (missing) preempted (2 and 1 items)"),
        ({"a": 1}, {"a": True}, "key a: 1 undisturbed, true preempted"),
        ({"a": "x"}, {"a": "x "}, 'key a: "x" undisturbed, "x " preempted'),
        ({"a'b:": 1}, {"a'b:": 2}, "1 undisturbed, 2 preempted"),
        ([1], {"a": 1}, "its value: [1] undisturbed"),
        ({"a": math.nan}, {"a": 1.5}, "key a: NaN undisturbed, 1.5 preempted"),
        ({"a": math.inf}, {"a": 1.5}, "key a: Infinity undisturbed, 1.5 preempted"),
        ({"a": 10**400}, {"a": 1.5}, "1.5 preempted"),
    ],
)
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_json_shows_the_key_and_both_values(
    tmp_path: Path, left: object, right: object, difference: str, tolerance: float | None
) -> None:
    found = compared(tmp_path, "r.json", left, right, tolerance=tolerance)
    assert not found.exact
    assert found.text.startswith("NOT exact: r.json differs in ")
    assert difference in found.text


def test_long_values_are_cut_around_what_differs(tmp_path: Path) -> None:
    found = compared(tmp_path, "r.json", {"text": "a" * 5000 + "b"}, {"text": "a" * 5000 + "c"})
    one, two = two_shown(found.text)
    assert one != two
    assert len(one) < 100


def test_values_that_are_equal_in_files_that_are_not(tmp_path: Path) -> None:
    strict = compared(tmp_path, "r.json", '{"a": 1}', '{"a":  1}')
    assert not strict.exact
    assert "line 1, column 7" in strict.text
    assert strict.notes == ("the values in r.json are equal; --tolerance 0 compares values only.",)
    found = compared(tmp_path, "r.json", '{"a": 1, "b": NaN}', '{"b": NaN,  "a": 1.0}', tolerance=0.0)
    assert found.text == "equal within 0 (largest difference 0): 1 of 1 files (r.json)"


def test_the_tolerance_is_relative_and_absolute_and_integers_are_equal(tmp_path: Path) -> None:
    def within(left: float, right: float, tolerance: float = 1e-3) -> bool:
        return compared(tmp_path, "r.json", {"a": [left]}, {"a": [right]}, tolerance=tolerance).exact

    for left, right in [(1e6, 1e6 + 1000.5), (1e6, 1e6 + 1002), (0.0, 0.00099), (0.0, 0.0011), (1.0, 0.9981)]:
        assert within(left, right) == bool(np.isclose(right, left, rtol=1e-3, atol=1e-3)), (left, right)
    assert within(100.0, 100.05)
    assert not within(10000, 10001)
    assert within(10000, 10001.0)
    found = compared(tmp_path, "r.json", {"a": [0.5, 2.0]}, {"a": [0.5, 2.0 + 3e-8]}, tolerance=1e-6)
    assert found.text == "equal within 1e-6 (largest difference 3e-8 in a[1]): 1 of 1 files (r.json)"


def test_ignored_keys_are_said_and_so_are_the_ones_not_found(tmp_path: Path) -> None:
    left, right = {"loss": 1, "times": [{"elapsed": 3}]}, {"loss": 1, "times": [{"elapsed": 4}], "at": "noon"}
    found = compared(tmp_path, "r.json", left, right, ignored_keys=("elapsed", "at", "tiem"))
    assert (found.exact, found.text) == (True, "equal: 1 of 1 files (r.json); ignored: at, elapsed; not found: tiem")
    assert not compared(tmp_path, "r.json", left, {**right, "loss": 2}, ignored_keys=("elapsed", "at")).exact


def test_json_lines_say_the_line(tmp_path: Path) -> None:
    left = '{"step": 1, "t": 3}\n{"step": 2, "loss": 0.5}\n'
    for name in ("m.jsonl", "m.json", "m.ndjson"):
        found = compared(tmp_path, name, left, left.replace("0.5", "0.75").replace("3", "4"), ignored_keys=("t",))
        assert f"{name} differs in line 2, key loss: 0.5 undisturbed, 0.75 preempted" in found.text
    found = compared(tmp_path, "m.jsonl", left, left + "{}\n")
    assert "line 3: (missing) undisturbed" in found.text


@pytest.mark.parametrize("broken", ["{", "[" * 100_000 + "]" * 100_000, "\udcff"])
def test_what_is_no_json_is_compared_byte_for_byte_and_said(tmp_path: Path, broken: str) -> None:
    found = compared(tmp_path, "r.json", broken.encode(errors="surrogateescape"), {"a": 1}, tolerance=1e-3)
    assert not found.exact
    assert found.notes == ("r.json was compared byte for byte: no JSON.",)


# -- CSV -------------------------------------------------------------------------------------------------------------


def test_lines_that_are_there_again_are_counted(tmp_path: Path) -> None:
    lines = ['{"step": 1}\n', '{"step": 2}\n', '{"step": 3}\n']
    found = compared(tmp_path, "a.jsonl", "".join(lines), "".join([*lines[:2], *lines[1:]]))
    assert found.cause == repeated.REPEATED
    assert found.text.endswith("(all 3 lines are there, and 1 of them again)")
    assert advice.with_cause(found, None).remedy == remedies.REPEATED_LINES.remedy
    for other in ("".join(lines[:2]), "".join([*lines, '{"step": 4}\n']), "".join([lines[0], *lines[:2]])):
        assert compared(tmp_path, "a.jsonl", "".join(lines), other).cause == "files"
    assert compared(tmp_path, "a.bin", "".join(lines), "".join([*lines, lines[2]])).cause == "files"


def test_tables_show_row_and_column(tmp_path: Path) -> None:
    left = "step,loss,time\n1,0.5,3\n2,0.25,4\n"
    right = "step,loss,time\n1,0.5,9\n2,0.2500001,9\n"
    assert "row 2, column time: '3' undisturbed, '9' preempted" in compared(tmp_path, "m.csv", left, right).text
    found = compared(tmp_path, "m.csv", left, right, ignored_keys=("time",))
    assert "row 3, column loss: '0.25' undisturbed, '0.2500001' preempted" in found.text
    found = compared(tmp_path, "m.csv", left, right, ignored_keys=("time",), tolerance=1e-6)
    assert found.exact
    assert (
        found.text == "equal within 1e-6 (largest difference 1e-7 in column loss): 1 of 1 files (m.csv); ignored: time"
    )
    tabs = [text.replace(",", "\t") for text in (left, right)]
    assert "row 2, column time" in compared(tmp_path, "m.tsv", *tabs).text
    semicolons = [text.replace(",", ";") for text in (left, right)]
    assert "row 2, column time" in compared(tmp_path, "m.csv", *semicolons).text


def test_tables_without_names_of_other_widths_and_lengths(tmp_path: Path) -> None:
    assert "row 1, column 2: '2' undisturbed, '3' preempted" in compared(tmp_path, "m.csv", "1,2\n", "1,3\n").text
    assert "row 1, column 3: (missing) undisturbed" in compared(tmp_path, "m.csv", "1,2\n", "1,2,3\n").text
    assert "row 2: (missing) undisturbed, '5,6' preempted" in compared(tmp_path, "m.csv", "1,2\n", "1,2\n5,6\n").text
    assert not compared(tmp_path, "m.csv", "a\n100\n", "a\n101\n", tolerance=0.1).exact, "integers"
    assert compared(tmp_path, "m.csv", "a\nnan\n", "a\nNaN\n", tolerance=0.1).exact
    long = f"a\n{'x' * (csv.field_size_limit() + 1)}"
    found = compared(tmp_path, "m.csv", f"{long}\n", f"{long}y\n", tolerance=0.1)
    assert found.notes == ("m.csv was compared byte for byte: no CSV in UTF-8.",)


# -- tensors ---------------------------------------------------------------------------------------------------------


def as_safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
    return lambda path: save_file(tensors, path, metadata)


def as_npz(tensors: dict[str, torch.Tensor], packed: bool = False):
    save = np.savez_compressed if packed else np.savez
    return lambda path: save(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


WRITERS = {
    "w.safetensors": as_safetensors, "w.npz": as_npz, "p.npz": lambda held: as_npz(held, True), "w.pt": torch_saver,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_tensors_show_the_greatest_difference_and_how_many(tmp_path: Path, name: str) -> None:
    write = WRITERS[name]
    left = {"a": torch.zeros(3), "model.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3)}
    right = {key: tensor.clone() for key, tensor in left.items()}
    right["model.weight"][1, 1] += 0.5
    right["model.weight"][0, 0] += 0.25
    found = compared(tmp_path, name, write(left), write(right))
    assert found.text == (
        f"NOT exact: {name} differs in tensor model.weight at [1, 1]: 4.0 undisturbed, 4.5 preempted "
        "(greatest difference 0.5; 2 of 6 elements differ)"
    )
    found = compared(tmp_path, name, write(left), write(right), tolerance=0.125)
    assert "at [0, 0]: 0.0 undisturbed, 0.25 preempted (greatest difference 0.25; 2 of 6" in found.text
    assert found.text.endswith("2 of 6 elements differ, 1 by more than the tolerance)")
    found = compared(tmp_path, name, write(left), write(right), ignored_keys=("model.weight",))
    assert found.text == f"equal: 1 of 1 files ({name}); ignored: model.weight"
    found = compared(tmp_path, name, write(left), write(right), tolerance=0.5)
    assert found.text == f"equal within 0.5 (largest difference 0.5 in model.weight): 1 of 1 files ({name})"


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pt"])
def test_another_shape_type_or_name_is_said(tmp_path: Path, name: str) -> None:
    write, here = WRITERS[name], {"a": torch.zeros(2, 3)}
    for there, difference in [
        ({"a": torch.zeros(3, 2)}, "tensor a: float32 [2, 3] undisturbed, float32 [3, 2] preempted"),
        ({"a": torch.zeros(2, 3).double()}, "tensor a: float32 [2, 3] undisturbed, float64 [2, 3] preempted"),
        ({"b": torch.zeros(2, 3)}, "tensor a: float32 [2, 3] undisturbed, (missing) preempted"),
    ]:
        assert difference in compared(tmp_path, name, write(here), write(there), tolerance=1.0).text


def test_nan_equals_nan_and_integers_have_no_tolerance(tmp_path: Path) -> None:
    def found(left: list[float], right: list[float], dtype: torch.dtype) -> Verdict:
        tensors = [{"a": torch.tensor(values, dtype=dtype)} for values in (left, right)]
        return compared(tmp_path, "w.safetensors", *map(as_safetensors, tensors), tolerance=0.1)

    nan, inf = math.nan, math.inf
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert found([nan, inf, -inf, 1.0], [nan, inf, -inf, 1.0625], dtype).exact
        for left, right in ([nan, 1.0], [1.0, nan]), ([inf, 1.0], [-inf, 1.0]), ([inf, 1.0], [3e4, 1.0]):
            assert "greatest difference inf or NaN" in found(left, right, dtype).text
        assert not found([1.0, 2.0], [1.0, 2.5], dtype).exact
    assert not found([100, 200], [100, 201], torch.int64).exact
    assert not found([0, 1], [1, 1], torch.bool).exact


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
     torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool],
)  # fmt: skip
def test_elements_are_decoded_as_torch_does(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    size = element_size(name)
    assert size
    data = bytes(range(256)) * 8 if dtype != torch.bool else bytes([0, 1] * 8)
    wanted = torch.frombuffer(bytearray(data), dtype=dtype).to(torch.float64 if dtype.is_floating_point else dtype)
    for order in "<>":
        swapped = b"".join(data[n : n + size][::-1] for n in range(0, len(data), size)) if order == ">" else data
        found = torch.tensor(numbers(name, order, swapped), dtype=wanted.dtype)
        assert torch.equal(found.nan_to_num(99) if dtype.is_floating_point else found,
                           wanted.nan_to_num(99) if dtype.is_floating_point else wanted)  # fmt: skip


@pytest.mark.parametrize("kind", ["big", "fortran", "complex", "text", "dates", "empty", "number"])
def test_arrays_of_numpys_own_kinds(tmp_path: Path, kind: str) -> None:
    array = np.arange(1, 7, dtype="f8").reshape(2, 3)
    left = {
        "big": array.astype(">f8"), "fortran": np.asfortranarray(array), "complex": array * (1 + 2j),
        "text": np.array([["ab", "c", "d"], ["e", "f", "g"]]), "dates": array.astype("M8[s]"),
        "empty": np.zeros((0, 3)), "number": np.float64(3.5),
    }[kind]  # fmt: skip
    right = left.copy(order="K") if kind == "fortran" else left.copy()
    if kind == "empty":
        right = np.zeros((0, 4))
    elif kind == "number":
        right = np.float64(4.5)
    else:
        right[1, 0] = "z" if kind == "text" else right[1, 1]
    files = [lambda path, held=held: np.save(path, held) for held in (left, right)]
    found = compared(tmp_path, "a.npy", *files, tolerance=1e-3)
    assert not found.exact
    if kind in ("big", "fortran", "complex"):
        assert "its array at [1, 0]" in found.text
    assert compared(tmp_path, "a.npy", files[0], files[0], tolerance=1e-3).exact


def test_values_beside_tensors_are_compared_too(tmp_path: Path) -> None:
    held = {"step": 10, "optimizer": {"state": {0: {"exp_avg": torch.ones(2, 2).T}}, "lr": [1e-3]}, "elapsed": 3.5,
            "shape": torch.Size([2]), "none": None, "nothing": {}}  # fmt: skip
    for change, difference in [
        ({"step": 11}, "key step: 10 undisturbed, 11 preempted"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "lr": [1e-3]}},
         "tensor optimizer.state[0].exp_avg at [0, 0]: 1.0 undisturbed, 0.0 preempted"),
        ({"optimizer": {**held["optimizer"], "lr": [2e-3]}}, "key optimizer.lr[0]: 0.001 undisturbed, 0.002 preempted"),
    ]:  # fmt: skip
        found = compared(tmp_path, "c.pt", torch_saver(held), torch_saver({**held, **change}))
        assert difference in found.text
    found = compared(
        tmp_path, "c.pt", torch_saver(held), torch_saver({**held, "elapsed": 9}), ignored_keys=("elapsed",)
    )
    assert found.exact
    metadata = [as_safetensors({"a": torch.zeros(1)}, {"step": step}) for step in ("1", "2")]
    assert 'key step: "1" undisturbed, "2" preempted' in compared(tmp_path, "w.safetensors", *metadata).text


class Own:
    """A class that would have to be unpickled."""


def test_what_torch_cannot_load_safely_is_compared_byte_for_byte_and_said(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    found = compared(tmp_path, "c.pt", torch_saver({"a": Evil()}), torch_saver({"a": Evil(), "b": 1}))
    assert not found.exact
    assert "differs in byte " in found.text
    assert "c.pt was compared byte for byte: torch.load(weights_only=True): " in found.notes[0]
    assert "Unsupported global: GLOBAL " in found.notes[0]
    assert len(found.notes[0]) < 160
    assert not marker.exists()
    legacy = [torch_saver({"a": torch.ones(n)}, _use_new_zipfile_serialization=False) for n in (2, 3)]
    assert "tensor a: float32 [2] undisturbed" in compared(tmp_path, "c.pth", *legacy).text


def test_a_bin_file_of_any_other_kind_is_bytes(tmp_path: Path) -> None:
    found = compared(tmp_path, "state.bin", b"\0\1", b"\0\2")
    assert (found.text, found.notes) == (
        "NOT exact: state.bin differs in byte 1: 0x01 undisturbed, 0x02 preempted", (),
    )  # fmt: skip
    found = compared(tmp_path, "state.bin", b"\0\1", b"\0\2", tolerance=0.1)
    assert found.notes == ("state.bin was compared byte for byte: no torch file.",)


@pytest.mark.slow
def test_a_python_without_torch_is_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {PYTHON} -S "$@"\n')
    python.chmod(0o755)
    held = [torch_saver({"a": torch.ones(n)}) for n in (2, 3)]
    found = compared(tmp_path, "c.pt", *held, python=str(python))
    assert "has no torch" in found.notes[0]
    assert "tensor a: float32 [2] undisturbed" in compared(tmp_path, "c.pt", *held).text, "from a cold start"
    found = compared(tmp_path, "c.pt", *held, python=str(tmp_path / "gone"))
    assert "No such file" in found.notes[0]


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.npy", "w.pt"])
def test_a_damaged_file_of_tensors_is_compared_byte_for_byte(tmp_path: Path, name: str) -> None:
    whole = tmp_path / name
    (torch_saver if name == "w.pt" else as_safetensors)({"a": torch.ones(100)})(whole)
    if name == "w.npz":
        as_npz({"a": torch.ones(100)})(whole)
    elif name == "w.npy":
        np.save(whole, np.ones(100))
    data = whole.read_bytes()
    for damaged in (
        data[:-200],
        data[:40],
        b"",
        b"PK\x03\x04" + bytes(100),
        b"\xff" * 100,
        b"\x93NUMPY\x01\x00\xff\xff(",
    ):
        found = compared(tmp_path, name, data, damaged, tolerance=0.1)
        assert not found.exact
        assert "differs in " in found.text
        assert found.notes or "(missing)" in found.text


def test_objects_in_arrays_are_not_unpickled(tmp_path: Path) -> None:
    arrays = [lambda path, n=n: np.save(path, np.array([{"a": n}], dtype=object)) for n in (1, 2)]
    found = compared(tmp_path, "a.npy", *arrays, tolerance=0.1)
    assert not found.exact
    assert found.notes == ("a.npy was compared byte for byte: has Python objects or records.",)


def test_a_file_larger_than_the_memory_allowed_is_compared(tmp_path: Path) -> None:
    """Half a GB of the same bytes but one: sparse files, so that no disk is needed."""
    size = 1 << 29
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    for side, value in (("left", 1.0), ("right", 1.5)):
        (tmp_path / side).mkdir()
        with (tmp_path / side / "w.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
            file.seek(8 + len(header) + (1 << 28))
            file.write(struct.pack("<f", value))
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from skyspot.rehearsal.compare.files import compare_files\n"
        "from skyspot.rehearsal.compare.difference import Sides\n"
        "from skyspot.rehearsal.compare.rules import Comparison, Pattern\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "left, right = ({None: Path(sys.argv[1], side)} for side in ('left', 'right'))\n"
        "print(compare_files(Comparison((Pattern('*'),)), left, right, Sides()).text)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    done = subprocess.run([PYTHON, "-c", code, tmp_path], capture_output=True, text=True, check=True, env=clean_env())
    text, grown = done.stdout.splitlines()
    assert f"tensor w at [{1 << 26}]: 1.0 undisturbed, 1.5 preempted" in text
    assert f"1 of {size // 4} elements differ" in text
    assert int(grown) < 200_000 * (1 if sys.platform == "linux" else 1024)


# -- several patterns, a command -------------------------------------------------------------------------------------


def test_each_pattern_has_to_match(tmp_path: Path) -> None:
    found = compared(tmp_path, "a.txt", "x", "x", "*.txt", "*.bin")
    assert (found.exact, found.checked) == (False, False)
    assert found.text == "not checked: no file in the bucket matches '*.bin'"
    assert compared(tmp_path, "a.txt", "x", "x", "*.txt", "a*").text == "byte-identical: 1 of 1 files (*.txt, a*)"


def test_patterns_of_several_buckets(tmp_path: Path) -> None:
    one, two = buckets(tmp_path, "a.txt", "x", "x")
    three, four = buckets(tmp_path / "more", "a.txt", "y", "z")
    rules = Comparison((Pattern("a.txt"), Pattern("a.txt", "/out")))
    found = compare_files(rules, {None: one, "/out": three}, {None: two, "/out": four}, Sides())
    assert found.text.startswith("NOT exact: /out/a.txt differs in line 1")


def test_a_command_judges_files_and_folders(tmp_path: Path) -> None:
    say = 'f() { echo "$(basename "$1") $(cat "$1"*/x "$2"*/x)"; }; f'
    found = compared(tmp_path, "r/x", "1", "2", "r", command=say)
    assert found.exact, found.text
    assert found.text == "equal by --compare-with: 1 of 1 files (r)"
    assert found.notes == ("--compare-with on r: r 12",)
    found = compared(tmp_path, "r/x", "1", "2", "**/*", command="diff -r")
    assert not found.exact
    assert found.text.startswith("NOT exact: r differs between the undisturbed and the preempted run: --compare-with")
    assert "exited with 1\n" in found.text
    assert "\n  < 1" in found.text
    one, two = buckets(tmp_path, "r/x", "1", "1")
    rules = Comparison(command="diff -r")
    assert compare_files(rules, {None: one}, {None: two}, Sides()).text == "equal by --compare-with: the bucket"
    assert compared(tmp_path, "r/x", "1", None, "r/*", command="true").text.endswith("missing after the preempted run")


def test_a_command_that_does_not_end_or_is_not_there_checks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LIMIT_S", 3)
    started = time.monotonic()
    found = compared(tmp_path, "x", "1", "1", command="echo begun; sleep 600; true")
    assert time.monotonic() - started < 60
    assert (found.exact, found.checked) == (False, False)
    assert "took more than 3 s\n  begun" in found.text
    found = compared(tmp_path, "x", "1", "1", command="A=1 no-such-program")
    assert (found.exact, found.checked) == (False, False)
    assert "could not be run (exit 127)" in found.text


@pytest.mark.parametrize("text", ["no-such-program -x", "", "'open", "./not-here.py"])
def test_a_command_that_is_not_there_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--compare-with"):
        command.check(text)
    for good in ("diff -r", "true", "A=1 cmp", "(cd /; cat)", "test 1 -eq"):
        command.check(good)


# -- the control -----------------------------------------------------------------------------------------------------


def test_the_control_says_what_differs_by_itself(tmp_path: Path) -> None:
    rules = Comparison((Pattern("r.json"),))
    left, right = buckets(tmp_path, "r.json", {"fitness": 1.5}, {"fitness": 1.75})
    found = control(Outcome({None: left}, None), Outcome({None: right}, None), rules)
    assert found
    assert (found.exact, found.checked) == (False, False)
    assert found.text == (
        "not reproducible by itself: not checked; first difference between two undisturbed runs: r.json differs in "
        "key fitness: 1.5 first undisturbed, 1.75 second undisturbed"
    )
    assert control(Outcome({None: left}, None), Outcome({None: left}, None), rules) is None


def test_the_control_compares_histories(tmp_path: Path) -> None:
    lines = {1: {"step": 1, "loss": 1.0}, 2: {"step": 2, "loss": 0.5}}
    one = verdict.History(lines, {"w": b"1"}, {})
    two = verdict.History({**lines, 2: {"step": 2, "loss": 0.25}}, {"w": b"1"}, {})
    found = control(Outcome({}, one), Outcome({}, two), Comparison())
    assert found
    assert "not reproducible by itself" in found.text
    assert found.first_step == 2
    assert control(Outcome({}, one), Outcome({}, one), Comparison()) is None


# -- in a rehearsal --------------------------------------------------------------------------------------------------


TASK = """\
name: own
envs: {{OUT: /checkpoints/own}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT}}
  ~/code/script.py: {script}
run: python ~/code/script.py
"""


def rehearse(folder: Path, script: str, *args: str) -> tuple[int, dict]:
    """The exit status and the result of a rehearsal with one kill."""
    (folder / "task.yaml").write_text(TASK.format(script=PROGRAMS / script))
    done = subprocess.run(
        [PYTHON, "-m", "skyspot", "rehearse", "task.yaml", "--kinds", "kill", "--preemptions", "1", "--json",
         "--compare", "own/result.json", *args],
        cwd=folder, env=clean_env(TMPDIR=str(folder)), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.stderr == "" or "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def legs(document: dict) -> list[str]:
    return [leg["name"] for leg in document["legs"]]


@pytest.mark.slow
def test_a_script_that_is_not_reproducible_is_said_to_be_so_first(tmp_path: Path) -> None:
    code, document = rehearse(tmp_path, "scripts/not_reproducible.py")
    assert (code, legs(document)) == (1, ["reference", "preempted", "control"])
    found = document["legs"][1]["verdict"]
    assert found["text"].startswith("not reproducible by itself: not checked; first difference between two undisturbed")
    assert "own/result.json differs in key fitness: " in found["text"]
    assert not found["checked"]


@pytest.mark.slow
def test_without_the_control_the_difference_is_all_that_is_said(tmp_path: Path) -> None:
    code, document = rehearse(tmp_path, "scripts/not_reproducible.py", "--assume-reproducible")
    assert (code, legs(document)) == (1, ["reference", "preempted"])
    assert document["legs"][1]["verdict"]["text"].startswith("NOT exact: own/result.json differs in key fitness: ")


@pytest.mark.slow
def test_a_wrong_script_that_is_reproducible_is_not_exact(tmp_path: Path) -> None:
    code, document = rehearse(tmp_path, "scripts/reseeded_order.py")
    assert (code, legs(document)) == (1, ["reference", "preempted", "control"])
    found = document["legs"][1]["verdict"]
    assert found["text"].startswith("NOT exact: own/result.json differs in ")
    assert found["notes"] == ["a second undisturbed run gave the same result."]


@pytest.mark.slow
def test_a_key_that_varies_can_be_ignored(tmp_path: Path) -> None:
    code, document = rehearse(tmp_path, "scripts/elapsed_in_result.py", "--ignore-key", "elapsed")
    assert legs(document) == ["reference", "preempted"]
    if sees_reads():
        assert code == 0
        assert document["legs"][1]["verdict"]["text"] == ("equal: 1 of 1 files (own/result.json); ignored: elapsed")
    else:
        assert code == 1
        assert "whether it resumed cannot be seen here" in document["legs"][1]["verdict"]["text"]
