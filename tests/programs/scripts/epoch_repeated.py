"""Logistic regression in epochs, each shuffled by its own number; a numbered checkpoint every 5 steps.

Its fault: the checkpoint holds the epoch and not the batch, so a restart trains on the epoch's first batches twice.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

EPOCHS, BATCH, SAVE_EVERY = 4, 20, 5  # Whatever is repeated makes one save more.
out = Path(os.environ["OUT"])
folder = out / "checkpoints"
folder.mkdir(parents=True, exist_ok=True)
points = np.random.default_rng(3).normal(size=(500, 10))
labels = (points.sum(axis=1) > 0).astype(float)


class Trainer:
    def __init__(self):
        self.weights, self.epoch, self.global_step = np.zeros(10), 0, 0

    def save(self):
        path = folder / f"step_{self.global_step:06d}.pkl"
        path.with_suffix(".tmp").write_bytes(pickle.dumps(self.__dict__))
        path.with_suffix(".tmp").rename(path)

    def resume(self):
        found = sorted(folder.glob("step_*.pkl"))
        if found:
            self.__dict__.update(pickle.loads(found[-1].read_bytes()))
            print(f"Resuming from {found[-1].name}: epoch {self.epoch}", flush=True)

    def fit(self):
        while self.epoch < EPOCHS:
            order = np.random.default_rng(self.epoch).permutation(len(points))
            for ids in order.reshape(-1, BATCH):
                x, y = points[ids], labels[ids]
                guess = 1 / (1 + np.exp(-x @ self.weights))
                self.weights = self.weights - 0.5 * x.T @ (guess - y) / BATCH
                self.global_step += 1
                time.sleep(0.02)
                if self.global_step % SAVE_EVERY == 0:
                    self.save()
            self.epoch += 1


trainer = Trainer()
trainer.resume()
trainer.fit()
(out / "result.json").write_text(json.dumps({"weights": [float(w) for w in trainer.weights]}))
