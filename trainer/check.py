"""Check that this Python has the requirements of training.

    python -m trainer.check          exit 0: all there; 1: something is missing, one line for each

setup.sh runs it twice: on the node's own Python, and on the environment that it made.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

NEEDED = {
    "torch": (2, 8),
    "transformers": (5, 0),
    "accelerate": (1, 10),
    "numpy": (1, 26),
    "safetensors": (0, 5),
    "tqdm": (4, 60),
    "xxhash": (3, 4),
    "pyyaml": (6, 0),
}


def problems() -> list[str]:
    """List the missing requirements, one line each."""
    found = []
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        found.append(f"Python {sys.version_info[0]}.{sys.version_info[1]}: 3.10 to 3.13 is needed")
    for name, least in NEEDED.items():
        wanted = ".".join(map(str, least))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name}: not installed; {wanted} or later is needed")
            continue
        if _numbers(version) < least:
            found.append(f"{name} {version}: {wanted} or later is needed")
    if not found and any(Path("/dev").glob("nvidia[0-9]*")):
        import torch

        if not torch.cuda.is_available():
            found.append(f"torch {torch.__version__} does not see this machine's GPU: a build for its driver is needed")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(character for character in part if character in "0123456789")
        numbers.append(int(digits or 0))
    return tuple(numbers)


if __name__ == "__main__":
    missing = problems()
    for line in missing:
        print(line, file=sys.stderr)
    sys.exit(1 if missing else 0)
