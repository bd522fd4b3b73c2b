"""Product files and functions stay small enough to read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import REPO

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
"""From `def` to its last line, with its docstring."""


def too_long(path: Path) -> Iterator[str]:
    text = path.read_text()
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path} has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("package", ["skyspot", "trainer"])
def test_no_product_file_and_no_function_is_too_long_to_read(package: str) -> None:
    files = sorted((REPO / package).rglob("*.py"))
    assert files
    assert [line for path in files for line in too_long(path)] == []


def test_a_line_too_many_is_found(tmp_path: Path) -> None:
    def written(file: int, function: int) -> list[str]:
        path = tmp_path / "module.py"
        path.write_text("def f():\n" + "    1\n" * (function - 1) + "1\n" * (file - function))
        return [line.removeprefix(f"{path}") for line in too_long(path)]

    assert written(MAX_FILE_LINES, MAX_FUNCTION_LINES) == []
    assert written(MAX_FILE_LINES + 1, 2) == [" has 401 lines"]
    assert written(100, MAX_FUNCTION_LINES + 1) == [":1: f has 61 lines"]
