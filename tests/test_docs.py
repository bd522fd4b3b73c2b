"""docs/attempt.md is true: its diagram, its table of threads and processes, its table of variables."""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support import REPO

PAGE = REPO / "docs" / "attempt.md"
VARIABLE = re.compile(r"SKYSPOT_[A-Z_]*[A-Z]\b")
PLACE = re.compile(r"((?:trainer|skyspot|templates)/[\w./]+)(?: ([\w.]+))?")
"""A file, and what it defines."""
STARTS = re.compile(
    r"([\w.]+\.)?(Thread|Timer|Popen|ThreadPoolExecutor|ProcessPoolExecutor|ThreadingHTTPServer)"
    r"|subprocess\.(run|call|check_call|check_output)|os\.(fork|forkpty|system|popen|posix_spawnp?|spawn\w+)"
    r"|(multiprocessing|mp)\.([\w.]+\.)?(Process|Pool)"
)
"""Calls that start a thread or a process."""


def product_files(repo: Path = REPO) -> Iterator[Path]:
    for top, suffixes in (("trainer", (".py", ".sh")), ("skyspot", (".py", ".sh")), ("templates", (".j2",))):
        yield from (path for path in sorted((repo / top).rglob("*")) if path.suffix in suffixes)


def definitions(source: str) -> set[str]:
    """Names of functions, methods and classes, as `Class.method`."""
    return {".".join(where) for node, where in walk(source) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def starts(source: str, name: str) -> Counter[str]:
    """How many threads and processes each function starts, by `file function`."""
    return Counter(
        f"{name} {'.'.join(where)}"
        for node, where in walk(source)
        if isinstance(node, ast.Call) and STARTS.fullmatch(ast.unparse(node.func))
    )


def walk(source: str) -> Iterator[tuple[ast.AST, list[str]]]:
    """Each node with the names of what it lies in, its own included; functions within functions count as these."""

    def visit(node: ast.AST, where: list[str], in_function: bool) -> Iterator[tuple[ast.AST, list[str]]]:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            named = not in_function and (is_function or isinstance(child, ast.ClassDef))
            inner = [*where, child.name] if named else where  # type: ignore[attr-defined]
            yield child, inner
            yield from visit(child, inner, in_function or is_function)

    return visit(ast.parse(source), [], False)


def rows(section: str, text: str) -> list[list[str]]:
    """The cells of all tables of a section."""
    [found] = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    lines = [line for line in found.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def missing(places: Iterable[str]) -> list[str]:
    """The files and functions among them that are not there."""
    found = []
    for place in places:
        path, _, name = place.partition(" ")
        if not (REPO / path).is_file() or (name and name not in definitions((REPO / path).read_text())):
            found.append(place)
    return found


def diagram_mistakes(text: str) -> list[str]:
    """The arrows that name no file and function, or one that is not there."""
    [diagram] = re.findall(r"```mermaid\n(.*?)```", text, flags=re.S)
    arrows = re.findall(r"^\s*\w+-{1,2}>>\w+: (.*)$", diagram, flags=re.M)
    assert len(arrows) > 20
    places = [PLACE.search(arrow) for arrow in arrows]
    unnamed = [arrow for arrow, place in zip(arrows, places, strict=True) if not (place and place[2])]
    return unnamed + missing(place[0] for place in places if place)


def thread_mistakes(text: str, code: Counter[str]) -> list[str]:
    """What the table of threads and processes lacks, or has too many of."""
    listed = Counter(row[0].strip("`") for row in rows("Threads and processes", text))
    return [f"+ {place}" for place in (code - listed)] + [f"- {place}" for place in (listed - code)]


def variable_mistakes(text: str, code: set[str]) -> list[str]:
    """What the table of variables lacks, or has too many of; and the files in a row that do not have its variable."""
    table = {row[0].strip("`"): row for row in rows("SKYSPOT_* variables", text)}
    found = [f"+ {name}" for name in sorted(code - table.keys())] + [
        f"- {name}" for name in sorted(table.keys() - code)
    ]
    for name, row in table.items():
        for path in re.findall(r"`([\w/]+\.[\w.]+)`", " ".join(row[1:3])):
            made = path == "skyspot/task/render.py" and "SKYSPOT_{" in (REPO / path).read_text()
            if not (REPO / path).is_file() or not (made or name in (REPO / path).read_text()):
                found.append(f"{name}: {path}")
    return found


@pytest.fixture(scope="module")
def started() -> Counter[str]:
    found: Counter[str] = Counter()
    for path in product_files():
        if path.suffix == ".py":
            found += starts(path.read_text(), path.relative_to(REPO).as_posix())
    return found


@pytest.fixture(scope="module")
def variables() -> set[str]:
    return {name for path in product_files() for name in VARIABLE.findall(path.read_text())}


def test_each_arrow_of_the_diagram_names_a_file_and_a_function_that_are_there() -> None:
    assert diagram_mistakes(PAGE.read_text()) == []


def test_each_thread_and_process_that_the_code_starts_is_in_the_table_and_no_other(started: Counter[str]) -> None:
    assert thread_mistakes(PAGE.read_text(), started) == []


def test_each_variable_of_the_code_is_in_the_table_and_no_other(variables: set[str]) -> None:
    assert variable_mistakes(PAGE.read_text(), variables) == []


def new(found: list[str], before: list[str]) -> list[str]:
    """The mistakes that a planted fault adds."""
    return list((Counter(found) - Counter(before)).elements())


@pytest.mark.parametrize(
    ("true", "false", "mistake"),
    [
        ("rank.py start_rank", "rank.py begin_rank", "trainer/launch/rank.py begin_rank"),
        ("exits.py combined_code", "ends.py combined_code", "trainer/launch/ends.py combined_code"),
        ("SIGTERM: trainer/launch/supervisor.py Supervisor.run", "SIGTERM", "SIGTERM"),
    ],
)
def test_a_fault_in_the_diagram_is_found(true: str, false: str, mistake: str) -> None:
    text = PAGE.read_text()
    assert new(diagram_mistakes(text.replace(true, false, 1)), diagram_mistakes(text)) == [mistake]


@pytest.mark.parametrize(
    "call",
    [
        "threading.Thread(target=f).start()", "Thread(target=f).start()", "subprocess.Popen(['true'])",
        "subprocess.run(['true'])", "os.fork()", "ThreadPoolExecutor(2)",
    ],
)  # fmt: skip
def test_a_thread_or_process_that_the_table_lacks_is_found(call: str, started: Counter[str]) -> None:
    text, before = PAGE.read_text(), thread_mistakes(PAGE.read_text(), started)
    more = starts(f"class A:\n    def go(self):\n        def inner():\n            {call}\n", "trainer/new.py")
    assert new(thread_mistakes(text, started + more), before) == ["+ trainer/new.py A.go"]


def test_a_second_thread_of_the_same_function_is_found_and_a_row_without_a_thread(started: Counter[str]) -> None:
    text, before = PAGE.read_text(), thread_mistakes(PAGE.read_text(), started)
    place = Counter(["trainer/launch/relay.py Relay.begin"])
    assert new(thread_mistakes(text, started + place), before) == ["+ trainer/launch/relay.py Relay.begin"]
    assert new(thread_mistakes(text, started - place), before) == ["- trainer/launch/relay.py Relay.begin"]


def test_a_variable_that_the_table_lacks_or_has_too_many_of_is_found(variables: set[str]) -> None:
    text, before = PAGE.read_text(), variable_mistakes(PAGE.read_text(), variables)
    assert new(variable_mistakes(text, {*variables, "SKYSPOT_NEW"}), before) == ["+ SKYSPOT_NEW"]
    assert new(variable_mistakes(text, variables - {"SKYSPOT_TTY"}), before) == ["- SKYSPOT_TTY"]
    moved = text.replace("`trainer/launch/grace.py`", "`trainer/launch/relay.py`")
    assert new(variable_mistakes(moved, variables), before) == ["SKYSPOT_GRACE_S: trainer/launch/relay.py"]
