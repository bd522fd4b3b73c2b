"""Regression with momentum; a checkpoint is four files, each written over in place every 10 steps.

Its faults: a kill in the middle of a file leaves one that cannot be read, and every restart fails at it. A kill
between two files leaves files of two saves side by side.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

STEPS, SAVE_EVERY, RATE, DECAY = 90, 10, 0.02, 0.9
save_dir = Path(os.environ["OUT"]) / "state"
save_dir.mkdir(parents=True, exist_ok=True)
source = np.random.default_rng(8)
inputs, mixing = source.normal(size=(256, 9)), source.normal(size=9)
outputs = np.tanh(inputs @ mixing)

weights, momentum, step = np.zeros(9), np.zeros(9), 0
rng = np.random.default_rng(99)


def save():
    np.save(save_dir / "weights.npy", weights)
    np.save(save_dir / "momentum.npy", momentum)
    with (save_dir / "rng.pkl").open("wb") as file:
        pickle.dump(rng.bit_generator.state, file)
    with (save_dir / "trainer_state.json").open("w") as file:
        json.dump({"global_step": step}, file)
    print(f"saved a checkpoint at step {step}", flush=True)


if (save_dir / "trainer_state.json").exists():
    step = json.loads((save_dir / "trainer_state.json").read_text())["global_step"]
    weights = np.load(save_dir / "weights.npy")
    momentum = np.load(save_dir / "momentum.npy")
    rng.bit_generator.state = pickle.loads((save_dir / "rng.pkl").read_bytes())
    print(f"loaded the checkpoint of step {step}", flush=True)

while step < STEPS:
    rows = rng.integers(0, 256, size=16)
    gradient = inputs[rows].T @ (inputs[rows] @ weights - outputs[rows]) / 16
    momentum = DECAY * momentum + gradient
    weights = weights - RATE * momentum
    step += 1
    time.sleep(0.02)
    if step % SAVE_EVERY == 0:
        save()

(save_dir.parent / "result.json").write_text(json.dumps({"weights": weights.tolist(), "steps": step}))
