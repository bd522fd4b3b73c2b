"""Fits a series by windows drawn at random, as small language models are trained; saves every 10 steps.

Its fault: a restart seeds the generator anew, so the batches after it are the first ones once more.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

STEPS, BATCH, WIDTH, SAVE_EVERY, RATE = 100, 16, 8, 10, 0.05
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(1337)
series = np.sin(np.arange(5000) / 7) + 0.3 * np.random.default_rng(0).normal(size=5000)


def get_batch():
    starts = rng.integers(0, len(series) - WIDTH - 1, size=BATCH)
    windows = np.stack([series[start : start + WIDTH + 1] for start in starts])
    return starts, windows[:, :-1], windows[:, -1]


step, weights = 0, np.zeros(WIDTH)
checkpoint = out / "checkpoint.pkl"
if checkpoint.exists():
    with checkpoint.open("rb") as file:
        saved = pickle.load(file)
    step, weights = saved["step"], saved["weights"]
    print(f"resumed from step {step}", flush=True)

with (out / f"metrics-{len(list(out.glob('metrics-*')))}.jsonl").open("w") as metrics:
    while step < STEPS:
        starts, x, y = get_batch()
        error = x @ weights - y
        weights = weights - RATE * x.T @ error / BATCH
        step += 1
        line = {"step": step, "loss": float((error**2).mean()), "first_sample": int(starts[0])}
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
        time.sleep(0.02)
        if step % SAVE_EVERY == 0:
            with (out / "checkpoint.tmp").open("wb") as file:
                pickle.dump({"step": step, "weights": weights}, file)
            (out / "checkpoint.tmp").replace(checkpoint)
(out / "result.json").write_text(json.dumps({"weights": weights.tolist()}))
