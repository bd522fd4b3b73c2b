"""Helpers of the tests of `skyspot rehearse`: a task, the command, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
from support import PROGRAMS, clean_env

OWN = """\
name: own
resources: {{accelerators: "A100:1", use_spot: true}}
envs: {{OUT: /checkpoints/own, STEPS: "40"}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT}}
  ~/code/counter.py: {program}
run: |
  python ~/code/counter.py
"""


def own(folder: Path, program: str = "counter.py") -> Path:
    path = folder / "task.yaml"
    path.write_text(OWN.format(program=PROGRAMS / program))
    return path


def rehearse(*args: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "skyspot", "rehearse", *map(str, args)],
        # Its machines lie in the test's own folder: what is left over of them is told from another test's by that.
        cwd=cwd, env=clean_env(**{"TMPDIR": str(cwd), **(env or {})}), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def leftovers(folder: Path) -> list[str]:
    """Processes, mounts and folders that the rehearsals of a test left behind."""
    found = [str(path) for path in folder.glob("skyspot-*")]
    for process in psutil.process_iter():
        try:
            words = [process.cwd(), *process.cmdline(), *process.environ().values()]
            if process.status() != psutil.STATUS_ZOMBIE and any(f"{folder}/" in word for word in words):
                found.append(f"process {process.pid} {process.cmdline()}")
        except (psutil.Error, OSError):
            continue
    mounts = Path("/proc/self/mounts")
    if mounts.exists():
        found += [line for line in mounts.read_text().splitlines() if f"{folder}/" in line]
    return found
