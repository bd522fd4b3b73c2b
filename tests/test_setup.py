"""setup.sh: finds a Python that can train, or says what is missing, in a HOME of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import NOT_HERE
from support import REPO, event


def home_with_payload(folder: Path) -> Path:
    home = folder / "home"
    shutil.copytree(REPO / "trainer", home / "skyspot" / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    return home


def setup(home: Path, path: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", **more}
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
    assert int((home / "skyspot" / "setup-seconds").read_text()) >= 0
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


def test_a_tracker_that_is_missing_is_installed_into_the_python_that_trains(tmp_path: Path) -> None:
    home = home_with_payload(tmp_path)
    (home / "skyspot" / "python").write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec "{sys.executable}" "$@"\n')
    (home / "skyspot" / "python").chmod(0o755)
    uv = home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    uv.chmod(0o755)
    path = "/usr/bin:/bin"
    assert setup(home, path, SKYSPOT_REPORT_TO="tensorboard, other;x").returncode == 0
    assert not (tmp_path / "asked").exists(), "it is there"
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tensorboard'] = None\n")
    done = setup(home, path, SKYSPOT_REPORT_TO="tensorboard")
    assert (done.returncode, done.stdout) == (0, "Installing tensorboard\n"), done.stderr
    assert (tmp_path / "asked").read_text() == f"pip install -q --python {sys.executable} tensorboard\n"
    uv.write_text("#!/bin/sh\nexit 75\n")
    assert setup(home, path, SKYSPOT_REPORT_TO="tensorboard").returncode == 1


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


def cpu_wheels() -> str | None:
    """Where pip is told to find a build of torch for the CPU; the index has builds of gigabytes alone."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
    )
    folder = asked.stdout.strip()
    return folder if folder and list(Path(folder).glob("torch-2.13.0*")) else None


@pytest.mark.slow(50)
def test_with_uv_alone_an_environment_is_made_and_used(tmp_path: Path) -> None:
    """As on a SkyPilot VM: no Python that will do, and ~/.local/bin/uv."""
    wheels = cpu_wheels()
    if wheels is None:
        pytest.skip(f"setup.sh with uv alone: {NOT_HERE}: the index has builds of torch of gigabytes alone")
    home = home_with_payload(tmp_path)
    tools = home / ".local" / "bin"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "uv", "uv"], check=True)
    tools.mkdir(parents=True)
    (tools / "uv").symlink_to(tmp_path / "uv" / "bin" / "uv")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("bash", "dirname", "mkdir", "chmod", "timeout", "cat", "env", "sh", "uname", "rm"):
        (bin_folder / name).symlink_to(str(shutil.which(name)))
    # The system's own, without what training needs.
    (bin_folder / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    env = {"HOME": str(home), "PATH": str(bin_folder), "UV_FIND_LINKS": wheels}
    # How this machine reaches the registry.
    ways = ("UV_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
    env |= {name: value for name, value in os.environ.items() if name.startswith(ways) and name not in env}
    script = home / "skyspot" / "trainer" / "setup.sh"
    done = subprocess.run(["bash", str(script)], env=env, cwd=home, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    python = home / "skyspot" / "python"
    asked = subprocess.run([python, "-c", "import sys, torch; print(sys.prefix)"], capture_output=True, text=True)
    assert asked.stdout.strip() == str(home / "skyspot" / "venv"), asked.stderr
    trained = subprocess.run(
        [python, "-m", "trainer", "--checkpoint-dir", str(tmp_path / "run"), "--max-steps", "6", "--processes", "1"],
        cwd=home / "skyspot", env={**env, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    taken = int((home / "skyspot" / "setup-seconds").read_text())
    assert event(tmp_path / "run", "start")["setup_s"] == taken > 0
