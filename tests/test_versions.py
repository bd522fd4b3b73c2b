"""The supported releases of each framework: every file has the same, and others are refused in a line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from support import PROGRAMS, REPO, clean_env, launch

from trainer.check import SUPPORTED
from trainer.training.config import TRACKERS

DOCS = (REPO / "docs" / "your-own-script.md").read_text()


def bounds(name: str) -> str:
    """As pip writes them."""
    least, below = (".".join(map(str, version)).removesuffix(".0") for version in SUPPORTED[name])
    return f">={least},<{below}"


def pins(file: str, name: str) -> list[str]:
    """The releases of a package that a file of requirements pins."""
    return re.findall(rf"^{name}==([\w.]+)", (REPO / file).read_text(), flags=re.M)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_file_agrees_on_the_supported_releases(name: str) -> None:
    supported = SpecifierSet(bounds(name))
    requirements = re.findall(rf'"{name}([<>=][^";]*)', (REPO / "pyproject.toml").read_text())
    assert [SpecifierSet(one) for one in requirements] == [supported]
    lowest = ".".join(map(str, SUPPORTED[name][0]))
    assert pins("constraints-lowest.txt", name) == [f"{lowest}.0"]
    newest = pins("constraints.txt", name)
    assert newest
    examples = "\n".join(path.read_text() for path in sorted((REPO / "examples").glob("*.yaml")))
    in_examples = re.findall(rf"'{name}([<>=][^']*)'", examples)
    assert all(SpecifierSet(one) == supported for one in in_examples)
    for pinned in (*newest, *pins("trainer/requirements.lock", name)):
        assert supported.contains(pinned)
    assert f"| {name} | {lowest}.0 | {newest[0]} | {bounds(name)[bounds(name).index('<') + 1 :]} |" in DOCS


@pytest.mark.parametrize("name", TRACKERS)
def test_every_file_agrees_on_the_lowest_release_of_a_tracker(name: str) -> None:
    least = re.findall(rf'"{name}>=([\d.]+)"', (REPO / "pyproject.toml").read_text())
    assert pins("constraints-lowest.txt", name) == [f"{one}.0" for one in least]
    assert f"`{name}>={least[0]}`" in (REPO / "docs" / "trackers.md").read_text()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder to put first on the search path; what is named there counts as installed."""
    return tmp_path / "site"


def say_installed(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("module", "name", "version"),
    [
        ("hf", "transformers", "4.57.6"),
        ("hf", "transformers", "6.0.0.dev0"),
        ("hf", "accelerate", "1.9.0"),
        ("lightning", "lightning", "2.4.0"),
        ("lightning", "lightning", "2.7"),
    ],
)
def test_another_release_is_refused_at_import(installed: Path, module: str, name: str, version: str) -> None:
    say_installed(installed, name, version)
    code = f"import trainer.{module}"
    env = clean_env(PYTHONPATH=f"{installed}:{REPO}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    least, below = (".".join(map(str, version)) for version in SUPPORTED[name])
    assert done.stderr == f"Error: {name} {version} is not supported: pip install '{name}>={least},<{below}'\n"
    env["LOCAL_RANK"] = "1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (1, ""), "one process of a machine says it"


@pytest.mark.slow
def test_another_release_of_the_models_framework_is_refused(installed: Path, tmp_path: Path) -> None:
    say_installed(installed, "peft", "0.17.0")
    env = clean_env(PYTHONPATH=f"{installed}:{REPO}")
    ended = launch(PROGRAMS / "hf.py", "--dir", tmp_path / "run", "--lora", "--until", 1, env=env)
    assert ended.code == 1
    assert "Error: peft 0.17.0 is not supported: pip install 'peft>=0.18,<0.22'" in ended.output
    assert "Traceback" not in ended.output
    ended = launch(PROGRAMS / "hf.py", "--dir", tmp_path / "run", "--until", 1, env=env)
    assert ended.code == 0, f"a model without an adapter does not need peft: {ended.output}"
