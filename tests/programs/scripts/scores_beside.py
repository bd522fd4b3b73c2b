"""An agent that learns; its scores are written at each step and never read, the agent itself every ten steps.

Its fault: the newest agent is loaded, even if it was cut in its middle. What is torn has to be the agent, not the
scores, which look like a checkpoint as well and come more often.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

STEPS, SAVE_EVERY = 110, 10
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)


def number(path):
    return int(path.stem.split("_")[1])


agent, first, scores = np.zeros(200), 0, []
found = sorted(out.glob("agent_*.dat"), key=number)
if found:
    agent, first, scores = pickle.loads(found[-1].read_bytes())
    print("playing on from", found[-1].name, flush=True)

for step in range(first + 1, STEPS + 1):
    agent = 0.98 * agent + np.random.default_rng(step).normal(size=200)
    scores.append(float(agent.mean()))
    np.savez(out / "scores.npz", scores=scores)
    time.sleep(0.02)
    if step % SAVE_EVERY == 0:
        (out / f"agent_{step}.dat").write_bytes(pickle.dumps((agent, step, scores)))
(out / "result.json").write_text(json.dumps(scores[-5:]))
