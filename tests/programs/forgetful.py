"""A training script of somebody's own that does not resume right: its weight goes on, its data starts from the front.

Its state is there from the first step on, whenever it is killed: one that began anew would end right after all.
"""

import json
import os
import random
import time
from pathlib import Path

STEPS = int(os.environ.get("STEPS", "40"))
folder = Path(os.environ["OUT"])
folder.mkdir(parents=True, exist_ok=True)
state = folder / "state.json"
step, weight = json.loads(state.read_text()) if state.exists() else (0, 0.0)
data = [random.Random(number).random() for number in range(1000)]
for position in range(STEPS - step):
    weight = 0.9 * weight + data[position]
    temporary = folder / "state.tmp"
    temporary.write_text(json.dumps([step + position + 1, weight]))
    temporary.replace(state)
    time.sleep(0.03)
(folder / "result.json").write_text(json.dumps({"weight": weight}))
