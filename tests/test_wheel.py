"""A wheel and an sdist, built from a clean copy, hold all that a user needs."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from support import REPO

SHIPPED = [
    "trainer/setup.sh",
    "trainer/requirements.lock",
    "trainer/.skyignore",
    "trainer/layout/names.py",
    "skyspot/cli/main.py",
    "skyspot/page/page.html.j2",
    "skyspot/page/page.css",
    "trainer/py.typed",
    "skyspot/py.typed",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dist/ of a clean copy of what git tracks (or would)."""
    clean = tmp_path_factory.mktemp("clean") / "skyspot"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPO, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPO / name).is_file():
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, clean / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", str(clean)],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return clean / "dist"


def test_both_hold_the_templates_and_the_payload(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {*SHIPPED, "skyspot/templates/finetune.yaml.j2", "skyspot/templates/command.yaml.j2"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/")) or "__pycache__" in name]
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {*SHIPPED, "templates/finetune.yaml.j2", "LICENSE", "README.md", "constraints.txt"} <= inside


@pytest.mark.slow
def test_the_wheel_renders_from_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # SkyPilot and torch are hundreds of megabytes that render does not need: what it does need is borrowed.
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", next(built.glob("*.whl"))],
        check=True, capture_output=True,
    )  # fmt: skip
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    for name in ("click", "jinja2", "markupsafe", "yaml"):
        module = __import__(name)
        shutil.copytree(Path(str(module.__file__)).parent, site / name)
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    program = tmp_path / "env" / "bin" / "skyspot"
    done = subprocess.run(
        [program, "render", "--gpus", "A100:8", "-n", "r", "-o", "."],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    task = yaml.safe_load((empty / ".skyspot" / "r.yaml").read_text())
    assert task["resources"]["accelerators"] == "A100:8"
    assert (empty / ".skyspot" / "r" / "trainer" / "setup.sh").is_file()
    listed = subprocess.run([program, "templates", "list"], cwd=empty, env=env, capture_output=True, text=True)
    assert "finetune" in listed.stdout
