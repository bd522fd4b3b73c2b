"""A bandit that learns which arm pays; saves its table every 10 rounds.

Its fault: the loop counts the rounds of this process, so a restart plays as many rounds as were asked for in all.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=90)
parser.add_argument("--out", type=Path, default=Path(os.environ["OUT"]))
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
checkpoint = args.out / "table.json"

played, values, counts = 0, [0.0] * 5, [0] * 5
if checkpoint.exists():
    state = json.loads(checkpoint.read_text())
    played, values, counts = state["played"], state["values"], state["counts"]
    print(f"continuing after {played} rounds", flush=True)

for _ in range(args.rounds):
    dice = random.Random(played)
    arm = dice.randrange(5) if dice.random() < 0.3 else values.index(max(values))
    reward = dice.gauss(arm / 5, 1.0)
    counts[arm] += 1
    values[arm] += (reward - values[arm]) / counts[arm]
    played += 1
    time.sleep(0.02)
    if played % 10 == 0:
        temporary = checkpoint.with_suffix(".tmp")
        temporary.write_text(json.dumps({"played": played, "values": values, "counts": counts}))
        temporary.replace(checkpoint)

(args.out / "result.json").write_text(json.dumps({"values": values, "best": values.index(max(values))}))
print("done")
