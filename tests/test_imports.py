"""What importing costs: a laptop's command line loads nothing heavy, and the contract only the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

from support import REPO, clean_env

HEAVY = {"torch", "sky", "transformers", "accelerate", "numpy", "rich", "psutil", "jinja2", "yaml"}


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), check=True)
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_by("import skyspot.cli")
    assert "click" in loaded
    assert not loaded & HEAVY


def test_rendering_and_rehearsing_load_neither_torch_nor_sky() -> None:
    loaded = loaded_by("import skyspot.render, skyspot.payload, skyspot.rehearse_cli")
    assert not loaded & {"torch", "sky", "transformers", "accelerate", "numpy"}


def test_checkpoints_are_verified_without_torch_and_without_sky() -> None:
    loaded = loaded_by("import skyspot.checkpoints_cli, trainer.verify")
    assert {"rich", "xxhash"} <= loaded
    assert not loaded & {"torch", "sky", "transformers", "accelerate", "numpy", "yaml", "upath", "fsspec"}


def test_a_template_is_rendered_without_what_a_plain_yaml_needs() -> None:
    code = (
        "from skyspot.cli import main\n"
        "import sys\n"
        "sys.argv = ['skyspot', 'render', '--gpus', 'A100:8', '-n', 'run-001']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), check=True)
    loaded = set(done.stderr.split())
    assert "jinja2" in loaded
    assert not loaded & {"skyspot.oldyaml", "skyspot.oldrungs", "skyspot.task", "skyspot.shell", "skyspot.lint"}


def test_the_contract_needs_the_standard_library_alone() -> None:
    outside = loaded_by("import trainer.layout") - set(sys.stdlib_module_names) - {"trainer", "__main__"}
    outside = {name for name in outside if not name.startswith(("_", "sitecustomize", "usercustomize"))}
    assert outside == set()
    for module in ("launch", "rank", "notice", "attempt", "keeper", "mounts"):
        more = loaded_by(f"import trainer.{module}") - set(sys.stdlib_module_names) - {"trainer", "__main__"}
        assert {name for name in more if not name.startswith("_")} == set(), module


def test_imports_go_one_way() -> None:
    trainer = {path.stem: imported(path) for path in (REPO / "trainer").glob("*.py")}
    at_run_time = {path.stem: imported(path, types=False) for path in (REPO / "trainer").glob("*.py")}
    modules = {f"trainer.{name}" for name in trainer}
    above = {
        "trainer.run": {"finetune"},
        "trainer.loop": {"run"},
        "trainer.export": {"loop"},
        "trainer.finetune": set[str](),
    }
    for name, names in trainer.items():
        assert not any(other.partition(".")[0] == "skyspot" for other in names), name
        for module, may in above.items():
            assert module not in at_run_time[name] or name in may, f"trainer/{name}.py imports {module}"
    for path in (REPO / "skyspot").glob("*.py"):
        assert imported(path) & modules <= {"trainer.layout", "trainer.verify"}, path
        talks_to_sky = "sky" in {name.partition(".")[0] for name in imported(path)}
        assert talks_to_sky == (path.name == "managed_jobs.py"), path
    for path in [*(REPO / "skyspot").glob("*.py"), *(REPO / "trainer").glob("*.py")]:
        if path.name != "__main__.py":
            assert not {"skyspot.cli", "trainer.finetune"} & imported(path), path


def test_no_module_of_skyspot_imports_one_that_imports_it() -> None:
    """Wherever an import stands: at the top, in a function, or for a type checker alone."""
    modules = {f"skyspot.{path.stem}": path for path in (REPO / "skyspot").glob("*.py")}
    left = {name: imported(path) & modules.keys() for name, path in modules.items()}
    while free := [name for name, names in left.items() if not names & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "these import each other in a circle, or one that does"


def test_one_module_reads_task_yamls() -> None:
    """Besides it, edits need the marks of the text; skyspot.yaml and a template's parameters are no task YAMLs."""
    readers = {path.stem for path in (REPO / "skyspot").glob("*.py") if reads_yaml(path)}
    assert readers == {"document", "yamlnodes", "settings", "template"}


def reads_yaml(path: Path) -> bool:
    """Whether a file uses what reads YAML, as an attribute of the package or imported from it."""
    reading = {"load", "load_all", "safe_load", "safe_load_all", "full_load", "compose", "compose_all", "parse", "scan"}
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "yaml":
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "yaml":
            used |= {one.name for one in node.names}
    return bool(used & reading)


def test_every_way_to_import_a_module_is_seen(tmp_path: Path) -> None:
    (tmp_path / "skyspot").mkdir()
    path = tmp_path / "skyspot" / "one.py"
    for statement, name in (
        ("import trainer.saving", "trainer.saving"),
        ("import trainer.saving as saving", "trainer.saving"),
        ("from trainer import saving", "trainer.saving"),
        ("from trainer import layout, saving as other", "trainer.saving"),
        ("from trainer.saving import Saver", "trainer.saving"),
        ("def f():\n    from trainer import saving", "trainer.saving"),
        ("from . import cli", "skyspot.cli"),
        ("from .cli import main", "skyspot.cli"),
        ("import importlib\nimportlib.import_module('trainer.saving')", "trainer.saving"),
        ("__import__('trainer.saving')", "trainer.saving"),
    ):
        path.write_text(f"{statement}\n")
        assert name in imported(path), statement


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what stands under `if TYPE_CHECKING:`."""

    def visit_If(self, node: ast.If) -> ast.If | list[ast.stmt]:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse
        self.generic_visit(node)
        return node


def imported(path: Path, types: bool = True) -> set[str]:
    """The modules that a file names to import, wherever it does so; of what it takes from packages, both readings.

    Args:
        path: The file.
        types: Whether what is imported for a type checker alone counts.
    """
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if not types:
        tree = WithoutTypes().visit(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = [path.parent.name] if node.level else []  # All modules lie at the top of their package.
            module = ".".join([*package, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found
