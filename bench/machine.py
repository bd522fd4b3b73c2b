"""Describes the machine on which the figures were measured."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "xxhash")


def describe(folder: Path) -> dict[str, str]:
    """Describe the machine, the disk of a folder and the versions, by topic."""
    return {
        "CPU": f"{_field('/proc/cpuinfo', 'model name') or platform.processor()}, {os.cpu_count()} cores",
        "Memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB, "
        f"transparent huge pages: {_huge_pages()}",
        "System": f"{platform.system()} {platform.release()}",
        "Disk": _disk(folder),
        "Python": platform.python_version(),
        "Versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def _field(path: str, name: str) -> str:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""


def _huge_pages() -> str:
    with suppress(OSError):
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text[text.index("[") + 1 : text.index("]")]
    return "unknown"


def _disk(folder: Path) -> str:
    with suppress(OSError):
        mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
        inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
        device, point, kind = max(inside, key=lambda mount: len(mount[1]))
        return f"{kind} on {device} at {point}"
    return "unknown"
