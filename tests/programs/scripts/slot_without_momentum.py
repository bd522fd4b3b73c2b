"""A fit by momentum; its checkpoints alternate between two files, each renamed into its place. The newer one is read.

Its fault: a.pkl is written without the momentum, so that a restart from it begins with none.
"""

import json
import os
import pickle
import time
from pathlib import Path

STEPS, SAVE_EVERY = 48, 4
out = Path(os.environ["OUT"])


def load():
    found = [pickle.loads(path.read_bytes()) for path in (out / "a.pkl", out / "b.pkl") if path.exists()]
    newest = max(found, key=lambda saved: saved["step"], default={"step": 0, "weight": 0.0})
    print("resuming after", newest["step"], flush=True)
    return newest["step"], newest["weight"], newest.get("momentum", 0.0)


def save(step, weight, momentum):
    saved, slot = {"step": step, "weight": weight}, "a.pkl"
    if step // SAVE_EVERY % 2 == 0:
        saved["momentum"], slot = momentum, "b.pkl"
    temporary = out / "checkpoint.tmp"
    temporary.write_bytes(pickle.dumps(saved))
    temporary.replace(out / slot)


def main():
    out.mkdir(parents=True, exist_ok=True)
    step, weight, momentum = load()
    while step < STEPS:
        momentum = 0.9 * momentum - 0.01 * (weight - step % 7)
        weight += momentum
        step += 1
        time.sleep(0.02)
        if step % SAVE_EVERY == 0:
            save(step, weight, momentum)
    (out / "result.json").write_text(json.dumps([weight, momentum]))


if __name__ == "__main__":
    main()
