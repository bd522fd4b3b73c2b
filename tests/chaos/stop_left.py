"""What a stop leaves in the run's folder, read without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import truth


def read(path: Path) -> str:
    """The text of a file; empty if there is none."""
    return path.read_text() if path.exists() else ""


def newest(run_dir: Path) -> int:
    """The step of the newest whole checkpoint, found without the code under test; 0 if there is none."""
    found = [truth.checkpoint(folder, _run_id(run_dir)) for folder in _checkpoints(run_dir)]
    return max((whole.step for whole in found if whole), default=0)


def torn(run_dir: Path, in_time: bool) -> tuple[str, ...]:
    """The checkpoints with a manifest that are not whole; a manifest that is cut off is none where a save was late."""
    return tuple(
        folder.name
        for folder in _checkpoints(run_dir)
        if (folder / "MANIFEST.json").exists() and not truth.checkpoint(folder, _run_id(run_dir))
        and (in_time or _is_json(folder / "MANIFEST.json"))
    )  # fmt: skip


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("*-a*"))


def _run_id(run_dir: Path) -> str:
    return str(json.loads(read(run_dir / "run.json") or "{}").get("run_id"))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def mixed(run_dir: Path) -> tuple[str, ...]:
    """The whole checkpoints whose optimizer has counted other steps than the checkpoint's."""
    found = []
    for folder in _checkpoints(run_dir):
        whole = truth.checkpoint(folder, _run_id(run_dir))
        counted = {step for share in folder.glob("share-*.safetensors") for step in _optimizer_steps(share)}
        if whole and counted - {whole.step}:
            found.append(f"step {whole.step} holds the optimizer's step {max(counted)}")
    return tuple(found)


def _optimizer_steps(share: Path) -> set[int]:
    """The steps that AdamW has counted for each parameter of a share."""
    data = share.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    starts = [entry["data_offsets"][0] for name, entry in header.items() if name.endswith(".step")]
    return {int(np.frombuffer(body, "<f4", 1, start)[0]) for start in starts}
