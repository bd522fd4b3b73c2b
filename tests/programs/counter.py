"""A training script of somebody's own, without a word of ours: it keeps its own state file, and resumes from it.

With RESUME=wrong it resumes its weight but starts its data from the front again: the mistake that a rehearsal is for.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

STEPS = int(os.environ.get("STEPS", "40"))
folder = Path(os.environ["OUT"])
folder.mkdir(parents=True, exist_ok=True)
state = folder / "state.json"
step, weight, position = 0, 0.0, 0
for path in (state, folder / "state.before.json"):  # The newest may be torn, or not be there yet.
    try:
        step, weight, position = json.loads(path.read_text())
        break
    except (OSError, ValueError):
        continue
if os.environ.get("RESUME") == "wrong":
    position = 0
data = [random.Random(number).random() for number in range(1000)]
print("starting at step", step, flush=True)
while step < STEPS:
    weight = 0.9 * weight + data[position]
    step, position = step + 1, position + 1
    if state.exists():
        state.replace(folder / "state.before.json")
    temporary = folder / "state.tmp"
    temporary.write_text(json.dumps([step, weight, position]))
    temporary.replace(state)
    time.sleep(0.03)
(folder / "result.json").write_text(json.dumps({"weight": weight}))
sys.exit(0)
