"""A walk that saves to numbered files. When four have gathered, it makes room.

Its fault: it deletes all of them before the next one is written, so that a kill in that save loses all work.
"""

import json
import os
import pickle
import random
import time
from pathlib import Path

STEPS, SAVE_EVERY, KEEP = 48, 4, 4
folder = Path(os.environ["OUT"]) / "states"


def number(path):
    return int(path.stem.partition("_")[2])


def load():
    found = sorted(folder.glob("step_*.pkl"), key=number)
    step, place, state = pickle.loads(found[-1].read_bytes()) if found else (0, 0.0, random.Random(5).getstate())
    dice = random.Random()
    dice.setstate(state)
    return step, place, dice


def save(step, place, dice):
    old = list(folder.glob("step_*.pkl"))
    if len(old) == KEEP:
        for path in old:
            path.unlink()
    temporary = folder / "state.tmp"
    temporary.write_bytes(pickle.dumps((step, place, dice.getstate())))
    temporary.replace(folder / f"step_{step}.pkl")


def main():
    folder.mkdir(parents=True, exist_ok=True)
    step, place, dice = load()
    while step < STEPS:
        place += dice.gauss(0, 1)
        step += 1
        time.sleep(0.02)
        if step % SAVE_EVERY == 0:
            save(step, place, dice)
    (folder.parent / "result.json").write_text(json.dumps(place))


if __name__ == "__main__":
    main()
