"""Tracks a drifting value for as long as it runs, as an online learner does; its estimate is saved every 10 steps.

It resumes right, but it never ends: there is no result to compare.
"""

import json
import math
import os
import time
from pathlib import Path

out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
path = out / "estimate.json"
step, estimate, speed = 0, 0.0, 0.0
if path.exists():
    step, estimate, speed = json.loads(path.read_text())
    print(f"going on at step {step}", flush=True)

while True:
    seen = math.sin(step / 40) + 0.1 * math.cos(step * 1.7)
    error = seen - estimate - speed
    estimate, speed = estimate + speed + 0.3 * error, speed + 0.05 * error
    step += 1
    time.sleep(0.02)
    if step % 10 == 0:
        path.with_suffix(".tmp").write_text(json.dumps([step, estimate, speed]))
        path.with_suffix(".tmp").replace(path)
    if step % 50 == 0:
        print(f"step {step}: {estimate:.4f}", flush=True)
