"""A fit by momentum; to save time, it writes the momentum into every second checkpoint only.

Its fault: a restart from one of the others begins with no momentum.
"""

import json
import os
import pickle
import time
from pathlib import Path

STEPS, SAVE_EVERY = 48, 4
checkpoint = Path(os.environ["OUT"]) / "checkpoint.pkl"


def load():
    if not checkpoint.exists():
        return 0, 0.0, 0.0
    saved = pickle.loads(checkpoint.read_bytes())
    print("resuming after", saved["step"], flush=True)
    return saved["step"], saved["weight"], saved.get("momentum", 0.0)


def save(step, weight, momentum):
    saved = {"step": step, "weight": weight}
    if step // SAVE_EVERY % 2 == 0:
        saved["momentum"] = momentum
    temporary = checkpoint.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(saved))
    temporary.replace(checkpoint)


def main():
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    step, weight, momentum = load()
    while step < STEPS:
        momentum = 0.9 * momentum - 0.01 * (weight - step % 7)
        weight += momentum
        step += 1
        time.sleep(0.02)
        if step % SAVE_EVERY == 0:
            save(step, weight, momentum)
    (checkpoint.parent / "result.json").write_text(json.dumps([weight, momentum]))


if __name__ == "__main__":
    main()
