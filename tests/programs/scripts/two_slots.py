"""A random walk; its checkpoints alternate between two files, a.pkl and b.pkl, and the newer one is read.

Its fault: a.pkl is written in place, so that one that is cut fails every restart. b.pkl is renamed into its place.
"""

import json
import os
import pickle
import random
import time
from pathlib import Path

STEPS, SAVE_EVERY = 48, 4
out = Path(os.environ["OUT"])
FIRST, SECOND = out / "a.pkl", out / "b.pkl"


def load():
    found = [pickle.loads(path.read_bytes()) for path in (FIRST, SECOND) if path.exists()]
    step, place, state = max(found, default=(0, 0.0, random.Random(7).getstate()))
    dice = random.Random()
    dice.setstate(state)
    return step, place, dice


def save(step, place, dice):
    data = pickle.dumps((step, place, dice.getstate()))
    if step // SAVE_EVERY % 2:
        FIRST.write_bytes(data)
    else:
        (out / "b.tmp").write_bytes(data)
        (out / "b.tmp").replace(SECOND)


def main():
    out.mkdir(parents=True, exist_ok=True)
    step, place, dice = load()
    while step < STEPS:
        place += dice.gauss(0, 1)
        step += 1
        time.sleep(0.02)
        if step % SAVE_EVERY == 0:
            save(step, place, dice)
    (out / "result.json").write_text(json.dumps(place))


if __name__ == "__main__":
    main()
