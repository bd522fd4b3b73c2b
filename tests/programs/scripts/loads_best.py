"""Keras-like: the last epoch and the best one are saved, each with all that a restart needs.

Its fault: a restart goes on from the best one. From the fourth epoch on that is old. The result is the same, because
the epochs since then are done again.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

EPOCHS, BATCHES = 48, 2
weights_dir = Path(os.environ["OUT"]) / "weights"
weights_dir.mkdir(parents=True, exist_ok=True)
last_path, best_path = weights_dir / "last.pkl", weights_dir / "best.pkl"
x = np.random.default_rng(0).normal(size=(160, 6))
y = x @ np.arange(6.0)


def save(path, state):
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(state))
    temporary.replace(path)


state = {"epoch": 0, "w": np.zeros(6), "best": float("inf")}
if best_path.exists():
    state = pickle.loads(best_path.read_bytes())
    print(f"restored the model of epoch {state['epoch']}", flush=True)
for epoch in range(state["epoch"], EPOCHS):
    rate = 0.1 if epoch < 3 else -0.02  # It overfits from here on.
    for batch in np.random.default_rng(epoch).permutation(160).reshape(BATCHES, -1):
        error = x[batch] @ state["w"] - y[batch]
        state["w"] = state["w"] - rate * x[batch].T @ error / len(batch)
        time.sleep(0.02)
    state["epoch"] = epoch + 1
    loss = float(((x @ state["w"] - y) ** 2).mean())
    better = loss < state["best"]
    state["best"] = min(loss, state["best"])
    save(last_path, state)
    if better:
        save(best_path, state)
    print(f"epoch {epoch + 1}: val_loss {loss:.3f}", flush=True)
(weights_dir.parent / "result.json").write_text(json.dumps({"w": state["w"].tolist(), "best": state["best"]}))
