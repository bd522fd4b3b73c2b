"""Evolution of a few parameters; saves all that it needs, its generator's state too.

It resumes right, but nobody can see that by its result: its seed is the operating system's, another one in each run.
"""

import json
import os
import pickle
import time
from pathlib import Path

import numpy as np

GENERATIONS, POPULATION, SAVE_EVERY = 80, 20, 8
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
checkpoint = out / "population.pkl"


def fitness(people):
    return -((people - np.arange(people.shape[1])) ** 2).sum(axis=1)


if checkpoint.exists():
    generation, people, rng = pickle.loads(checkpoint.read_bytes())
    print(f"generation {generation} was saved", flush=True)
else:
    generation, rng = 0, np.random.default_rng()
    people = rng.normal(size=(POPULATION, 6))

while generation < GENERATIONS:
    best = people[np.argsort(fitness(people))[-5:]]
    parents = rng.integers(0, 5, size=POPULATION)
    people = best[parents] + 0.1 * rng.normal(size=people.shape)
    generation += 1
    time.sleep(0.02)
    if generation % SAVE_EVERY == 0:
        temporary = checkpoint.with_suffix(".tmp")
        temporary.write_bytes(pickle.dumps((generation, people, rng)))
        temporary.replace(checkpoint)

(out / "result.json").write_text(json.dumps({"fitness": float(fitness(people).max())}))
