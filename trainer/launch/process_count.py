"""The number of ranks to start on this machine. Standard library only."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainer.errors import TrainerError


class LaunchError(TrainerError):
    """The ranks cannot be started; the message gives the reason and the remedy."""


def process_count(requested: int | None, cpu: bool) -> int:
    """Return SKYSPOT_PROCESSES (set by a rehearsal), else what was requested, else one per accelerator, else 1.

    Raises:
        LaunchError: one of them is not a number of processes.
    """
    for name, text in (("SKYSPOT_PROCESSES", os.environ.get("SKYSPOT_PROCESSES")), ("--processes", requested)):
        if text not in (None, ""):
            if not re.fullmatch("[0-9]{1,9}", str(text)) or not 1 <= int(str(text)) <= 1024:
                raise LaunchError(f"{name}: {text!r} is not a number of processes (1 to 1024)")
            return int(str(text))
    if cpu:
        return 1
    per_node = os.environ.get("SKYPILOT_NUM_GPUS_PER_NODE", "")
    if re.fullmatch("[0-9]{1,9}", per_node) and int(per_node):
        return int(per_node)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    return max(1, sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia[0-9]*")))
