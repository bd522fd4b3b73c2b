"""A linear classifier in epochs; saves after each epoch, and at SIGTERM.

Its fault: at SIGTERM it saves the weights of this moment under the number of the last whole epoch. A restart trains
on the first batches of the broken epoch twice.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

EPOCHS, BATCH = 5, 25
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
path = out / "checkpoint.json"
rng = np.random.default_rng(13)
x = rng.normal(size=(500, 7))
y = np.sign(x @ rng.normal(size=7))
weights, first_epoch = np.zeros(7), 0


def save(epoch):
    temporary = out / "checkpoint.json.tmp"
    temporary.write_text(json.dumps({"epoch": epoch, "weights": weights.tolist()}))
    temporary.replace(path)


def on_sigterm(signum, frame):
    print("SIGTERM: saving", flush=True)
    save(epoch - 1)
    sys.exit(128 + signum)


if path.exists():
    saved = json.loads(path.read_text())
    weights, first_epoch = np.array(saved["weights"]), saved["epoch"] + 1
    print(f"resuming with epoch {first_epoch}", flush=True)

epoch = first_epoch
signal.signal(signal.SIGTERM, on_sigterm)
for epoch in range(first_epoch, EPOCHS):
    for rows in np.random.default_rng(epoch).permutation(len(x)).reshape(-1, BATCH):
        margin = y[rows] * (x[rows] @ weights)
        weights = weights + 0.1 * (x[rows] * (y[rows] * (margin < 1))[:, None]).mean(axis=0) - 0.001 * weights
        time.sleep(0.02)
    save(epoch)
(out / "result.json").write_text(json.dumps({"weights": weights.tolist()}))
