"""setup.sh: finds a Python that can train, or says what is missing, in a HOME of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import REPO


def home_with_payload(folder: Path) -> Path:
    home = folder / "home"
    shutil.copytree(REPO / "trainer", home / "skyspot" / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    return home


def setup(home: Path, path: str) -> subprocess.CompletedProcess[str]:
    env = {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8"}
    script = home / "skyspot" / "trainer" / "setup.sh"
    return subprocess.run(["bash", str(script)], env=env, cwd=home, capture_output=True, text=True, timeout=120)


def test_a_python_that_has_what_training_needs_is_used(tmp_path: Path) -> None:
    home = home_with_payload(tmp_path)
    bin_folder = str(Path(sys.executable).parent)
    done = setup(home, f"{bin_folder}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    python = home / "skyspot" / "python"
    asked = subprocess.run(
        [str(python), "-c", "import sys, torch; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert asked.stdout.strip() == sys.prefix, "through the script it is the environment, not the base Python"
    before = python.stat().st_mtime_ns
    assert setup(home, "/usr/bin:/bin").returncode == 0, "a second time it is there already"
    assert python.stat().st_mtime_ns == before


def test_without_a_python_that_will_do_and_without_uv_it_says_so_and_leaves_with_1(tmp_path: Path) -> None:
    home = home_with_payload(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "chmod", "timeout", "cat", "env"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    (tools / "python3").write_text(f'#!/bin/sh\nexec "{sys.base_prefix}/bin/python3" -S "$@"\n')
    (tools / "python3").chmod(0o755)
    done = setup(home, str(tools))
    assert done.returncode == 1
    assert "no uv to install it with" in done.stderr
    assert "torch: not installed" in done.stderr
    assert not (home / "skyspot" / "python").exists()


def test_every_failure_of_setup_is_a_1(tmp_path: Path) -> None:
    """SkyPilot counts setup's exit codes among those to recover on: a 75 from a tool must not get out."""
    home = home_with_payload(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "uv").write_text("#!/bin/sh\nexit 75\n")
    (tools / "python3").write_text("#!/bin/sh\nexit 75\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    assert setup(home, f"{tools}:/usr/bin:/bin").returncode == 1


def test_the_check_names_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "trainer.check"], capture_output=True, text=True, cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "torch: not installed; 2.8 or later is needed" in done.stderr
    assert subprocess.run([sys.executable, "-m", "trainer.check"], cwd=REPO).returncode == 0
