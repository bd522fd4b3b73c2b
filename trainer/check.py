"""Check that this Python has the requirements of training.

    python -m trainer.check          exit 0: all there; 1: something is missing, one line for each

setup.sh runs it twice: on the node's own Python, and on the environment that it made.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

Version = tuple[int, int]
"""A release: (major, minor)."""

SUPPORTED: dict[str, tuple[Version, Version]] = {
    "accelerate": ((1, 10), (2, 0)),
    "datasets": ((4, 7), (5, 0)),
    "lightning": ((2, 5), (2, 7)),
    "peft": ((0, 18), (0, 22)),
    "torchdata": ((0, 11), (0, 12)),
    "transformers": ((5, 0), (6, 0)),
    "trl": ((0, 27), (2, 0)),
}
"""For each framework, the first release that works, and the first that is not supported."""

NEEDED: dict[str, tuple[Version, Version | None]] = {
    "torch": ((2, 8), None),
    "transformers": SUPPORTED["transformers"],
    "accelerate": SUPPORTED["accelerate"],
    "numpy": ((1, 26), None),
    "safetensors": ((0, 5), None),
    "tqdm": ((4, 60), None),
    "xxhash": ((3, 4), None),
    "pyyaml": ((6, 0), None),
}
"""For each requirement of training, the first release that works, and the first that is not supported, if any."""


def problems() -> list[str]:
    """List the missing requirements, one line each."""
    found = []
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        found.append(f"Python {sys.version_info[0]}.{sys.version_info[1]}: 3.10 to 3.13 is needed")
    for name, (least, below) in NEEDED.items():
        wanted = f"{_text(least)} or later" if below is None else f"{name}>={_text(least)},<{_text(below)}"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name}: not installed; {wanted} is needed")
            continue
        if _numbers(version) < least or (below and _numbers(version) >= below):
            found.append(f"{name} {version}: {wanted} is needed")
    if not found and any(Path("/dev").glob("nvidia[0-9]*")):
        import torch

        if not torch.cuda.is_available():
            found.append(f"torch {torch.__version__} does not see this machine's GPU: a build for its driver is needed")
    return found


def unsupported(*names: str) -> str:
    """The first of these frameworks whose installed version is not supported, in a line; empty if there is none."""
    for name in names:
        least, below = SUPPORTED[name]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not least <= _numbers(version) < below:
            return f"{name} {version} is not supported: pip install '{name}>={_text(least)},<{_text(below)}'"
    return ""


def installed(name: str) -> Version:
    """The installed release of a framework, as (major, minor).

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return _numbers(metadata.version(name))


def require(*names: str) -> None:
    """End the process with a line if the installed version of one of these frameworks is not supported.

    Raises:
        SystemExit: a version is not supported.
    """
    if found := unsupported(*names):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"Error: {found}", file=sys.stderr, flush=True)
        sys.exit(1)


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _numbers(version: str) -> Version:
    numbers = []
    for part in f"{version.split('+')[0]}.0".split(".")[:2]:
        digits = "".join(character for character in part if character in "0123456789")
        numbers.append(int(digits or 0))
    return numbers[0], numbers[1]


if __name__ == "__main__":
    missing = problems()
    for line in missing:
        print(line, file=sys.stderr)
    sys.exit(1 if missing else 0)
