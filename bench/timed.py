"""A command's wall time and CPU seconds."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timed:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    """CPU seconds of the command and of all its descendants that it waited for."""


def run(command: Sequence[object], cwd: Path, env: Mapping[str, str] | None = None) -> Timed:
    """Run a command to its end."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    wall_s, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timed(done.returncode, done.stdout, done.stderr, wall_s, cpu_s)
