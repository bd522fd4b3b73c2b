"""The Python of a rehearsal's machines: what `python`, `python3` and `~/skyspot/python` mean there."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from skyspot.errors import UsageError
from skyspot.home import expanded

_PROBE = "import json, platform, sys; print(json.dumps([sys.prefix, sys.base_prefix, platform.python_version()]))"


@dataclass(frozen=True)
class Interpreter:
    """A Python on this machine."""

    path: Path
    prefix: Path
    """The folder of its environment."""
    base_prefix: Path
    """The folder of the installation that the environment was made from."""
    version: str

    @property
    def folders(self) -> tuple[Path, Path]:
        """The folders with its files."""
        return self.prefix, self.base_prefix

    def install(self, *places: Path) -> None:
        """Write a program to each place that starts this Python."""
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            # A link would do for an installation; a virtual environment is found by the path of the program.
            place.write_text(f'#!/bin/sh\nexec {shlex.quote(str(self.path))} "$@"\n')
            place.chmod(0o755)


def this_interpreter() -> Interpreter:
    """The Python that skyspot itself runs with."""
    return Interpreter(Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), platform.python_version())


def find_interpreter(where: str) -> Interpreter:
    """The Python of a virtual environment's folder, of a path, or of a name on PATH.

    Raises:
        UsageError: there is none, or it does not run.
    """
    place = expanded(where)
    if place.is_dir():
        path = place / "bin" / "python"
        if not path.is_file():
            raise UsageError(f"--python {where}: no virtual environment; it has no bin/python")
    elif place.is_file():
        path = place
    else:
        found = shutil.which(where) if os.sep not in where else None
        if found is None:
            raise UsageError(
                f"--python {where}: no such Python; pass a virtual environment's folder or a Python's path"
            )
        path = Path(found)
    # Not resolved: a virtual environment's Python is usually a link to another one.
    path = Path(os.path.abspath(path))  # noqa: PTH100
    try:
        done = subprocess.run([str(path), "-c", _PROBE], capture_output=True, text=True, timeout=60)
        prefix, base_prefix, version = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--python {where}: {path} does not run: {error}") from None
    except ValueError:
        raise UsageError(f"--python {where}: {path} is not a Python 3") from None
    return Interpreter(path, Path(prefix), Path(base_prefix), version)
