"""As the ImageNet example of PyTorch: the last epoch is saved, and copied to model_best if its accuracy is the best.

Its fault: the best accuracy is saved and not loaded, so that the first epoch after a restart is taken for the best.
"""

import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np

EPOCHS, BATCHES = 12, 8
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
checkpoint_path, best_path = out / "checkpoint.pth.tar", out / "model_best.pth.tar"
x = np.random.default_rng(1).normal(size=(160, 5))
y = x @ np.ones(5)

start_epoch, best_accuracy, w = 0, -float("inf"), np.zeros(5)
if checkpoint_path.is_file():
    checkpoint = pickle.loads(checkpoint_path.read_bytes())
    start_epoch, w = checkpoint["epoch"], checkpoint["state_dict"]
    print(f"=> loaded checkpoint (epoch {start_epoch})", flush=True)

for epoch in range(start_epoch, EPOCHS):
    rate = 0.1 if epoch < 2 else -0.02
    for batch in np.random.default_rng(epoch).permutation(160).reshape(BATCHES, -1):
        w = w - rate * x[batch].T @ (x[batch] @ w - y[batch]) / len(batch)
        time.sleep(0.02)
    accuracy = -float(((x @ w - y) ** 2).mean())
    is_best, best_accuracy = accuracy > best_accuracy, max(accuracy, best_accuracy)
    state = {"epoch": epoch + 1, "state_dict": w, "best_accuracy": best_accuracy}
    (out / "checkpoint.tmp").write_bytes(pickle.dumps(state))
    (out / "checkpoint.tmp").replace(checkpoint_path)
    if is_best:
        shutil.copyfile(checkpoint_path, best_path)
    print(f" * accuracy {accuracy:.4f}", flush=True)
