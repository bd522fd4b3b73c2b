"""Counts words of a made-up text with a decaying average; its result tells how long this process has trained, too.

It is right: what differs from run to run is the time alone.
"""

import json
import os
import random
import time
from collections import defaultdict
from pathlib import Path

started = time.time()
STEPS, SAVE_EVERY = 100, 10
WORDS = ["the", "a", "spot", "machine", "goes", "comes", "back", "step", "by", "loss", "falls"]
out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
latest = out / "counts.json"
step, counts = 0, defaultdict(float)
if latest.exists():
    saved = json.loads(latest.read_text())
    step, counts = saved["step"], defaultdict(float, saved["counts"])
    print(f"Resumed at step {step}", flush=True)

while step < STEPS:
    text = random.Random(f"text {step}").choices(WORDS, k=50)
    for word in WORDS:
        counts[word] *= 0.99
    for word in text:
        counts[word] += 1.0
    step += 1
    time.sleep(0.02)
    if step % SAVE_EVERY == 0:
        (out / "counts.json.tmp").write_text(json.dumps({"step": step, "counts": counts}))
        (out / "counts.json.tmp").replace(latest)

result = {"step": step, "top": max(counts, key=counts.get), "counts": counts, "elapsed": time.time() - started}
(out / "result.json").write_text(json.dumps(result, indent=2))
