"""The curves of a run: what TensorBoard shows of it, and what its records have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import history
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = dict[str, list[tuple[int, float]]]
"""By name: (step, value) in the order in which a viewer gets them."""


def scalars(path: Path) -> Curve:
    """What an event file, or a folder of event files, has for a viewer, by TensorBoard's own reader."""
    found = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def shown(run_dir: Path) -> Curve:
    """What TensorBoard shows of a run that reports there."""
    return scalars(run_dir / "tensorboard")


def recorded(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """One of these curves from the lines of metrics that count."""
    lines = [line for line in history(run_dir) if name in line]
    return [(int(str(line["step"])), float(np.float32(line[name]))) for line in lines]  # type: ignore[arg-type]
