"""Matrix factorization; a checkpoint is a folder, and a file named DONE is written into it last.

It is right where files arrive in the order in which they were written: a folder without DONE is passed over.
"""

import json
import os
import time
from pathlib import Path

import numpy as np

STEPS, SAVE_EVERY, RANK = 90, 10, 3
root = Path(os.environ["OUT"])
root.mkdir(parents=True, exist_ok=True)
target = np.random.default_rng(31).normal(size=(20, RANK)) @ np.random.default_rng(32).normal(size=(RANK, 20))


def save(left, right, rng, step):
    folder = root / f"step_{step:05d}"
    folder.mkdir(exist_ok=True)
    np.save(folder / "left.npy", left)
    np.save(folder / "right.npy", right)
    (folder / "state.json").write_text(json.dumps({"step": step, "rng": rng.bit_generator.state}))
    (folder / "DONE").touch()


def newest():
    done = [marker.parent for marker in root.glob("step_*/DONE")]
    return max(done, default=None, key=lambda folder: folder.name)


rng = np.random.default_rng(33)
left, right, step = rng.normal(size=(20, RANK)), rng.normal(size=(RANK, 20)), 0
if folder := newest():
    left, right = np.load(folder / "left.npy"), np.load(folder / "right.npy")
    state = json.loads((folder / "state.json").read_text())
    step, rng.bit_generator.state = state["step"], state["rng"]
    print(f"restored {folder.name}", flush=True)

while step < STEPS:
    mask = rng.random(target.shape) < 0.5
    error = mask * (left @ right - target)
    left, right = left - 0.02 * error @ right.T, right - 0.02 * left.T @ error
    step += 1
    time.sleep(0.06)  # Two saves are further apart than the uploads of one.
    if step % SAVE_EVERY == 0:
        save(left, right, rng, step)

np.save(root / "final.npy", left @ right)
