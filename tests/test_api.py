"""The public API of the trainer: names, parameters and defaults are those of tests/golden/api.txt.

A change there breaks training scripts of users. Where it is meant: python tests/test_api.py > tests/golden/api.txt
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden" / "api.txt"
MODULES = ["trainer"]
CALLBACKS = ["trainer.hf", "trainer.lightning"]
"""Their methods are the frameworks' hooks. They are read, not imported: a framework takes seconds to load."""


def public() -> Iterator[tuple[str, Any]]:
    """(name, class or function) of everything that a script may import."""
    for name in MODULES:
        module = importlib.import_module(name)
        for part in sorted(module.__all__):
            yield f"{name}.{part}", getattr(module, part)


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """(name, member) of what a class defines itself, without what it inherits."""
    for name, member in sorted(vars(kind).items()):
        if not name.startswith("_"):
            yield name, member


def attributes(kind: type) -> list[str]:
    """Attributes of its instances that its docstring has for scripts."""
    told = [line for line in (inspect.getdoc(kind) or "").splitlines() if line.startswith("Attributes for scripts: ")]
    names = sorted(re.findall(r"`(\w+)`", "".join(told)))
    source = "".join(inspect.getsource(base) for base in kind.__mro__[:-1])
    for name in names:
        assert re.search(rf"self\.{name}\b(: [^=]+|, [^=]+)? = ", source), f"{kind.__name__} has no {name}"
    return names


def signature(thing: Any) -> str:
    """Parameters and defaults, without annotations."""
    found = inspect.signature(thing)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def constructors() -> Iterator[tuple[str, ast.FunctionDef]]:
    for name in CALLBACKS:
        tree = ast.parse((REPO / f"{name.replace('.', '/')}.py").read_text())
        for kind in tree.body:
            if isinstance(kind, ast.ClassDef) and kind.name == "SpotCallback":
                for part in kind.body:
                    if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                        yield f"{name}.SpotCallback", part


def lines() -> Iterator[str]:
    for name, constructor in constructors():
        for one in ast.walk(constructor.args):
            if isinstance(one, ast.arg):
                one.annotation = None
        yield f"{name}({ast.unparse(constructor.args).removeprefix('self, ')})"
    for name, thing in public():
        if not isinstance(thing, type):
            yield f"{name}{signature(thing)}" if callable(thing) else f"{name} = {thing!r}"
            continue
        yield f"{name}{signature(thing)}"
        yield from (f"{name}.{attribute}" for attribute in attributes(thing))
        for part, member in members(thing):
            if dataclasses.is_dataclass(thing) and part in {one.name for one in dataclasses.fields(thing)}:
                continue
            if callable(member):
                yield f"{name}.{part}{signature(member)}"
            elif isinstance(member, property):
                yield f"{name}.{part}"


def test_the_public_api_is_the_one_that_is_listed() -> None:
    assert "\n".join(lines()) + "\n" == GOLDEN.read_text(), __doc__


def test_completion_offers_the_api_of_a_run_alone() -> None:
    run = object.__new__(importlib.import_module("trainer").SpotRun)
    listed = {line.split("(")[0].rpartition(".")[2] for line in lines() if line.startswith("trainer.SpotRun.")}
    assert set(dir(run)) == listed


def described() -> Iterator[tuple[str, Any, str]]:
    for name, thing in public():
        yield name, thing, inspect.getdoc(thing) or ""
        if isinstance(thing, type) and not dataclasses.is_dataclass(thing):
            yield f"{name}()", thing.__init__, inspect.getdoc(thing.__init__) or ""
            for part, member in members(thing):
                if callable(member) or isinstance(member, property):
                    yield f"{name}.{part}", member, inspect.getdoc(member) or ""


def test_what_a_script_may_use_is_described_with_every_parameter() -> None:
    lacking = []
    for name, thing, text in described():
        parameters = list(inspect.signature(thing).parameters)[1:] if inspect.isfunction(thing) else []
        lacking += [name] if not text else []
        lacking += [f"{name}: {one}" for one in parameters if not re.search(rf"^ *{one}: \S", text, flags=re.M)]
    for name, constructor in constructors():
        told = ast.get_docstring(constructor) or ""
        given = [one.arg for one in [*constructor.args.args[1:], *constructor.args.kwonlyargs]]
        lacking += [f"{name}: {one}" for one in given if not re.search(rf"^ *{one}: \S", told, flags=re.M)]
    assert lacking == []


if __name__ == "__main__":
    print("\n".join(lines()))
