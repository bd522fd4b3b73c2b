"""Noisy regression; saves when the validation loss is the best so far, and then all that a restart needs.

It is right, though much may be done again: between two bests nothing is saved.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

STEPS, EVAL_EVERY, BATCH, RATE = 120, 5, 8, 0.18
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
best_path = out / "best.pkl"
data = np.random.default_rng(21)
x, truth = data.normal(size=(600, 12)), data.normal(size=12)
y = x @ truth + data.normal(size=600)
train, valid = slice(0, 500), slice(500, 600)

rng = np.random.default_rng(5)
state = {"step": 0, "weights": np.zeros(12), "best": float("inf")}
if best_path.exists():
    with best_path.open("rb") as file:
        state = pickle.load(file)
    rng.bit_generator.state = state["rng"]
    print(f"resumed from the best so far: step {state['step']}, {state['best']:.4f}", flush=True)

while state["step"] < STEPS:
    rows = rng.choice(500, size=BATCH, replace=False)
    xb, yb = x[train][rows], y[train][rows]
    rate = RATE * (1 - state["step"] / STEPS)
    state["weights"] = state["weights"] - rate * xb.T @ (xb @ state["weights"] - yb) / BATCH
    state["step"] += 1
    time.sleep(0.02)
    if state["step"] % EVAL_EVERY == 0:
        loss = float(((x[valid] @ state["weights"] - y[valid]) ** 2).mean())
        print(f"step {state['step']}: validation loss {loss:.4f}", flush=True)
        if loss < state["best"]:
            state.update(best=loss, rng=rng.bit_generator.state)
            temporary = out / "best.tmp"
            temporary.write_bytes(pickle.dumps(state))
            temporary.replace(best_path)

(out / "result.json").write_text(json.dumps({"best": state["best"], "weights": state["weights"].tolist()}))
