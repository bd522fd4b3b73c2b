"""Gradient descent with a warm-up; a CSV of each step's loss and learning rate, as loggers write it.

Its fault: the warm-up counts the steps of the process, so that each restart warms up again.
"""

import csv
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

STEPS, SAVE_EVERY, WARMUP, RATE = 100, 10, 15, 0.1
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
model_path, log_path = out / "model.pkl", out / "metrics.csv"

w, done = np.zeros(8), 0
if model_path.exists():
    w, done = pickle.loads(model_path.read_bytes())
    print(f"continuing after step {done}", flush=True)

new = not log_path.exists()
with log_path.open("a", newline="", buffering=1) as file:
    log = csv.writer(file)
    if new:
        log.writerow(["step", "train_loss", "lr", "seconds"])
    for number, step in enumerate(range(done + 1, STEPS + 1)):
        began = time.perf_counter()
        rate = RATE * min(1, (number + 1) / WARMUP)
        gradient = w - np.random.default_rng(step).normal(1, 1, size=8)
        w = w - rate * gradient
        time.sleep(0.02)
        log.writerow([step, round(float((gradient**2).mean()), 6), round(rate, 6), time.perf_counter() - began])
        if step % SAVE_EVERY == 0:
            (out / "model.tmp").write_bytes(pickle.dumps((w, step)))
            (out / "model.tmp").replace(model_path)
(out / "result.json").write_text(json.dumps(w.tolist()))
