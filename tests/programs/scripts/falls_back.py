"""Simulated annealing of a tour; the state before is kept under another name, and read if the newest is not whole.

It is right: of the two files, one is whole at every moment.
"""

import json
import math
import os
import pickle
import random
import time
from pathlib import Path

CITIES, STEPS, TRIES = 25, 90, 40
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
newest, before = out / "tour.pkl", out / "tour.pkl.bak"
places = [(random.Random(city).random(), random.Random(-city - 1).random()) for city in range(CITIES)]


def length(tour):
    return sum(math.dist(places[a], places[b]) for a, b in zip(tour, [*tour[1:], tour[0]], strict=True))


def load():
    for path in (newest, before):
        try:
            state = pickle.loads(path.read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            print(f"{path.name}: not there or not whole", flush=True)
            path.unlink(missing_ok=True)  # Or the next save would make it the one before, in place of a whole one.
        else:
            print(f"{path.name}: step {state['step']}", flush=True)
            return state
    return {"step": 0, "tour": list(range(CITIES)), "dice": random.Random(4).getstate()}


state = load()
dice = random.Random()
dice.setstate(state["dice"])
while state["step"] < STEPS:
    heat = 0.3 * (1 - state["step"] / STEPS) + 1e-3
    for _ in range(TRIES):
        first, last = sorted(dice.sample(range(CITIES), 2))
        tour = state["tour"]
        other = tour[:first] + tour[first : last + 1][::-1] + tour[last + 1 :]
        if dice.random() < math.exp(min(0.0, (length(tour) - length(other)) / heat)):
            state["tour"] = other
    state.update(step=state["step"] + 1, dice=dice.getstate())
    time.sleep(0.02)
    if state["step"] % 6 == 0:
        if newest.exists():
            newest.replace(before)
        newest.write_bytes(pickle.dumps(state))
(out / "result.json").write_text(json.dumps({"length": length(state["tour"]), "tour": state["tour"]}))
