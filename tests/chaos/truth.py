"""The truth about a run's folder, found without the code under test: the whole checkpoints, and their content."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

NAME = re.compile(r"(\d{10})-a(\d{4,9})-([0-9a-f]{6})-(\d{1,6})")
WIDE, NARROW = 3000, 40
CUT = ("model.weight", "optim.0.weight.exp_avg")
"""The tensors that are sharded over the ranks, if there are several."""
ORDER = ("model.bias", "model.seen", "model.weight", "optim.0.bias.exp_avg", "optim.0.weight.exp_avg")


@dataclass(frozen=True, order=True)
class Whole:
    """A checkpoint that is committed and matches its manifest."""

    step: int
    attempt: int
    token: str
    save: int

    def __str__(self) -> str:
        """The name of its folder."""
        return f"{self.step:010d}-a{self.attempt:04d}-{self.token}-{self.save}"


def state(run: int, step: int) -> dict[str, np.ndarray]:
    """A run's tensors at a boundary. Every element depends on run and step, so that any mixture shows."""
    number = 1000.0 * (step + 100 * run)
    wide, narrow = np.arange(WIDE) % 1000, np.arange(NARROW)
    return {
        "model.weight": (number + wide).astype(np.float32),
        "model.bias": (number + narrow).astype(np.float32),
        "model.seen": np.array([run, step, run * step], dtype=np.int64),
        "optim.0.weight.exp_avg": (-number - wide).astype(np.float32),
        "optim.0.bias.exp_avg": (-number - narrow).astype(np.float32),
    }


def digest(tensors: dict[str, np.ndarray]) -> str:
    """One digest of all tensors of a state."""
    hashed = hashlib.sha256()
    for name in ORDER:
        hashed.update(name.encode() + tensors[name].tobytes())
    return hashed.hexdigest()


def cut(tensors: dict[str, np.ndarray], rank: int, ranks: int) -> dict[str, np.ndarray]:
    """The part of a state that one rank holds."""
    rows = -(-WIDE // ranks)
    return {
        name: array[rank * rows : (rank + 1) * rows].copy() if name in CUT else array for name, array in tensors.items()
    }


def run_id(run: int) -> str:
    """A run's id in its manifests."""
    return hashlib.sha256(json.dumps({"run": run}, sort_keys=True).encode()).hexdigest()[:16]


def whole(run_dir: Path, run: int) -> list[Whole]:
    """The whole checkpoints of a run in its folder, newest first; another run's do not count."""
    try:
        names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    except FileNotFoundError:
        return []
    found = [checkpoint(run_dir / "checkpoints" / name, run_id(run)) for name in names]
    return sorted((one for one in found if one), reverse=True)


def named(name: str) -> Whole | None:
    """The checkpoint that a folder is named after; None if that is not a checkpoint's name."""
    match = NAME.fullmatch(name)
    return Whole(int(match[1]), int(match[2]), match[3], int(match[4])) if match else None


def checkpoint(folder: Path, its_run: str) -> Whole | None:
    """The checkpoint in a folder; None if it is not whole, differs from the folder's name, or is another run's."""
    found = named(folder.name)
    return found if found and _is_whole(folder, found, its_run) else None


def _is_whole(folder: Path, name: Whole, its_run: str) -> bool:
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_bytes().decode("utf-8"))
        files, seal = manifest["files"], manifest.pop("seal", None)
        if seal is not None:
            text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
            if hashlib.blake2b(text, digest_size=16).hexdigest() != seal:
                return False
        said = (manifest["step"], manifest["attempt"], manifest["kind"])
        if said != (name.step, f"a{name.attempt:04d}-{name.token}", "checkpoint"):
            return False
        if manifest["run_id"] != its_run:
            return False
        if "state.json" not in files or "share-00000.safetensors" not in files:
            return False
        for name, record in files.items():
            path = folder / name
            if not stat.S_ISREG(path.lstat().st_mode):
                return False
            data = path.read_bytes()
            if len(data) != record["bytes"] or xxhash.xxh3_128_hexdigest(data) != record["hash"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
