"""A perceptron; its model is saved when training is over, and not before.

Its fault: a preemption takes all that was done, however late it comes.
"""

import os
import random
import time
from pathlib import Path

import numpy as np

random.seed(0)
np.random.seed(0)
EPOCHS = 6
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)

features = np.random.randn(300, 5)
targets = np.where(features @ np.array([1.0, -2.0, 0.5, 0.0, 3.0]) > 0.2, 1, -1)
weights, bias = np.zeros(5), 0.0
for epoch in range(EPOCHS):
    order = list(range(len(features)))
    random.shuffle(order)
    mistakes = 0
    for begin in range(0, len(order), 20):
        for sample in order[begin : begin + 20]:
            if targets[sample] * (features[sample] @ weights + bias) <= 0:
                weights += targets[sample] * features[sample]
                bias += targets[sample]
                mistakes += 1
        time.sleep(0.02)
    print(f"epoch {epoch}: {mistakes} mistakes", flush=True)

np.save(out / "model.npy", np.append(weights, bias))
print("model saved")
