"""Ridge regression by gradient steps; saves one file every 10 steps, and reads it at the start.

Its fault: what it reads goes to a function's own names. It says that it resumes, and trains from nothing.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

STEPS, SAVE_EVERY = 90, 10


def load_checkpoint(path, weights, step):
    if path.exists():
        print(f"Resuming from {path.name}", flush=True)
        state = pickle.loads(path.read_bytes())
        weights, step = state["weights"], state["step"]
        print(f"Resumed at step {step}, |w| = {np.abs(weights).sum():.4f}", flush=True)


def save_checkpoint(path, weights, step):
    temporary = path.with_name("last.tmp")
    temporary.write_bytes(pickle.dumps({"weights": weights, "step": step}))
    temporary.replace(path)


def main():
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    x = rng.normal(size=(400, 6))
    y = x @ np.arange(6) + rng.normal(size=400)
    weights, step = np.zeros(6), 0
    load_checkpoint(out / "last.pkl", weights, step)
    while step < STEPS:
        rows = np.random.default_rng(step).integers(0, len(x), size=32)
        gradient = x[rows].T @ (x[rows] @ weights - y[rows]) / 32 + 0.01 * weights
        weights = weights - 0.05 * gradient
        step += 1
        time.sleep(0.02)
        if step % SAVE_EVERY == 0:
            save_checkpoint(out / "last.pkl", weights, step)
    (out / "result.json").write_text(json.dumps(weights.tolist()))


if __name__ == "__main__":
    main()
