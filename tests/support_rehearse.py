"""Helpers of the tests of `skyspot rehearse`: a task, the command, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
from support import PROGRAMS, clean_env

from skyspot.rehearsal import machine
from skyspot.rehearsal.bucketfs.watcher import events_missing

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


def trains(folder: str = "/checkpoints", steps: int = 20) -> str:
    """Shell lines that count up, a step in 0.05 s, and go on from where a machine was taken."""
    return (
        f"  n=$(cat {folder}/n 2> /dev/null || echo 0)\n"
        f"  while [ $n -lt {steps} ]; do\n"
        f"    n=$((n + 1)); sleep 0.05; echo $n > {folder}/n.new; mv {folder}/n.new {folder}/n\n"
        "  done\n"
    )


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


def sees_reads() -> bool:
    """True if a rehearsal sees what is read from the bucket: through FUSE, or by the system's file events."""
    return machine.bucketfs_missing() is None or events_missing() is None


def is_exact(done: subprocess.CompletedProcess[str], *, namespace: bool = True) -> bool:
    """True if a rehearsal of a task without records found it exact; where no reads are seen, all but if it resumed."""
    if sees_reads() if namespace else events_missing() is None:
        return done.returncode == 0
    return done.returncode == 1 and "not checked: whether it resumed cannot be seen here" in done.stdout


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
