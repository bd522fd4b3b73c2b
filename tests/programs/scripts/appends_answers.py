"""Answers prompts, a line of JSON for each; a restart reads the lines that are there and does the rest.

Its fault: a line that was cut in its middle cannot be read, and stops every restart.
"""

import json
import os
import random
import time
from pathlib import Path

out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
path = out / "answers.jsonl"
prompts = {f"prompt-{number:03d}": number for number in range(110)}

done = set()
if path.exists():
    with path.open() as file:
        done = {json.loads(line)["prompt"] for line in file}
    print(f"{len(done)} of {len(prompts)} are done", flush=True)

with path.open("a", buffering=1) as file:
    for prompt, seed in prompts.items():
        if prompt in done:
            continue
        time.sleep(0.02)
        file.write(json.dumps({"prompt": prompt, "answer": random.Random(seed).choices("abcdef", k=8)}) + "\n")
