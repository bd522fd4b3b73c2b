"""A moving average of a stream; a log from the first step on, a checkpoint every 25 steps.

Its fault: a restart goes on with the average and reads the stream from its front. A strike that only waits for the
first file comes before the first checkpoint, and finds nothing.
"""

import json
import logging
import os
import random
import time
from pathlib import Path

out = Path(os.environ["OUT"])
(out / "logs").mkdir(parents=True, exist_ok=True)
(out / "ckpt").mkdir(exist_ok=True)
logging.basicConfig(filename=out / "logs" / "train.log", level=logging.INFO, format="%(asctime)s %(message)s")
log = logging.getLogger("train")
config = {"steps": 110, "save_every": 25, "beta": 0.95}
log.info("config: %s", config)


def stream():
    source = random.Random(2024)
    while True:
        yield source.expovariate(1.0)


def restore():
    path = out / "ckpt" / "state.json"
    if not path.exists():
        log.info("no checkpoint, starting from scratch")
        return 0, 0.0
    state = json.loads(path.read_text())
    log.info("restored step %d", state["step"])
    return state["step"], state["average"]


step, average = restore()
for value in stream():
    average = config["beta"] * average + (1 - config["beta"]) * value
    step += 1
    log.info("step %d value %.6f average %.6f", step, value, average)
    time.sleep(0.02)
    if step % config["save_every"] == 0:
        temporary = out / "ckpt" / "state.json.tmp"
        temporary.write_text(json.dumps({"step": step, "average": average}))
        temporary.replace(out / "ckpt" / "state.json")
        log.info("saved step %d", step)
    if step >= config["steps"]:
        break

(out / "result.json").write_text(json.dumps({"average": average}))
log.info("finished")
