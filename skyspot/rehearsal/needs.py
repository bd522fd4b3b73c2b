"""What a task gets from a rehearsal's machine in place of what SkyPilot would give it: accelerators and a Python."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from skyspot.rehearsal.result import Settings
from skyspot.rehearsal.task import RehearsalTask


def with_needs(task: RehearsalTask, settings: Settings) -> RehearsalTask:
    """The task with the number of accelerators and the Python that the user chose, and with notes on what differs."""
    chosen = settings.gpus_per_node is not None
    count = settings.gpus_per_node if settings.gpus_per_node is not None else task.gpus_per_node
    python = settings.interpreter or task.interpreter
    notes = [*task.notes]
    has_setup = task.setup.strip() and task.envs.get("SKYSPOT_SETUP") != "true"  # The template command's default.
    if has_setup and not settings.setup:
        notes.append("the task's `setup` was not run; --setup runs it on each new machine.")
    another = "" if settings.interpreter else "; --python VENV chooses another"
    notes.append(f"`python` on its machines was {python.path} ({python.version}){another}.")
    notes += gpu_notes(count, gpus_here(), chosen=chosen)
    return dataclasses.replace(task, gpus_per_node=count, interpreter=python, notes=tuple(notes))


def gpu_notes(count: int, here: int, *, chosen: bool) -> list[str]:
    """Say where a machine with this many GPUs differs from what the task was told."""
    if count <= here:
        return []
    fewer = "" if chosen else f"; --gpus-per-node {max(1, here)} changes it"
    told = f"SKYPILOT_NUM_GPUS_PER_NODE was {count}{fewer}."
    if here:
        return [f"this machine has {here} GPU{'s' if here > 1 else ''}. {told}"]
    return [f"this machine has no GPU, so CUDA_VISIBLE_DEVICES was empty. {told}"]


def gpus_here(dev: Path = Path("/dev")) -> int:
    """Count this machine's GPUs; 1 where they cannot be counted (AMD's, and those of Windows' Linux)."""
    count = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in dev.glob("nvidia*"))
    return count or int(any((dev / name).exists() for name in ("kfd", "dxg")))
