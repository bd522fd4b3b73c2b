"""A random walk; checkpoints are numbered by the step.

Its fault: the last of the sorted names is loaded, and ckpt_8 comes after ckpt_16 to ckpt_72. The result is the
same, because the steps since then are done again.
"""

import glob
import json
import os
import pickle
import random
import time

OUT = os.environ["OUT"]
STEPS, SAVE_EVERY = 160, 8
os.makedirs(OUT, exist_ok=True)  # noqa: PTH103

rng = random.Random(7)
step, place = 0, [0.0, 0.0]
found = sorted(glob.glob(f"{OUT}/ckpt_*.pkl"))  # noqa: PTH207
if found:
    with open(found[-1], "rb") as file:  # noqa: PTH123
        step, place, state = pickle.load(file)
    rng.setstate(state)
    print("resuming from", found[-1], flush=True)

while step < STEPS:
    place[rng.randrange(2)] += rng.gauss(0, 1)
    step += 1
    time.sleep(0.02)
    if step % SAVE_EVERY == 0:
        with open(f"{OUT}/writing", "wb") as file:  # noqa: PTH123
            pickle.dump((step, place, rng.getstate()), file)
        os.replace(f"{OUT}/writing", f"{OUT}/ckpt_{step}.pkl")  # noqa: PTH105

with open(f"{OUT}/result.json", "w") as file:  # noqa: PTH123
    json.dump(place, file)
