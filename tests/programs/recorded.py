"""A run with the records of skyspot's trainer, but without torch: a step in 30 ms, a save after every 5 steps.

MODE is how it resumes: `right`; `deletes`: its checkpoints are gone at each start; `older`: from the second newest;
`folders`: each attempt has a run folder of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from pathlib import Path

from trainer.bucket.hashing import hash_file
from trainer.layout.documents import to_json
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import MANIFEST, AttemptName, CheckpointName, RunPaths, list_attempts, list_checkpoints

STEPS, EVERY = int(os.environ.get("STEPS", "40")), int(os.environ.get("EVERY", "5"))
MODE = os.environ.get("MODE", "right")


def commit(folder: Path, kind: str, name: str, data: bytes, **facts: object) -> None:
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    files = {name: FileRecord(len(data), hash_file(folder / name))}
    (folder / MANIFEST).write_bytes(Manifest(kind, files, facts).to_json())


def tensors(value: float) -> bytes:
    data = json.dumps(value).ljust(24).encode()
    header = json.dumps({"weight": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


own = f"-{secrets.token_hex(2)}" if MODE == "folders" else ""
paths = RunPaths(Path(os.environ["OUT"] + own))
if MODE == "deletes":
    shutil.rmtree(paths.checkpoints, ignore_errors=True)
attempt = AttemptName(len(list_attempts(paths)) + 1, secrets.token_hex(3))
paths.attempt(attempt).mkdir(parents=True)
events = 0


def event(name: str, **fields: object) -> None:
    global events
    events += 1
    paths.event(attempt, events, name).write_bytes(to_json(fields))


there = [name for name in list_checkpoints(paths) if (paths.checkpoint(name) / MANIFEST).exists()]
there = there[1:] if MODE == "older" else there
state = json.loads((paths.checkpoint(there[0]) / "state.json").read_text()) if there else {"step": 0, "sum": 0.0}
event("restored", step=state["step"])
event("first-step", step=state["step"] + 1, seconds=0.1)
with paths.metrics(attempt, state["step"] + 1).open("a") as metrics:
    for step in range(state["step"] + 1, STEPS + 1):
        time.sleep(0.03)
        state = {"step": step, "sum": 0.9 * state["sum"] + step}
        line = {"step": step, "loss": 5.0 / step, "lr": 0.1, "order": f"o{step}", "rng": "r", "step_s": 0.03}
        metrics.write(json.dumps(line | {"world_size": 1}) + "\n")
        metrics.flush()
        if step % EVERY == 0:
            name = CheckpointName(step, attempt, step // EVERY)
            commit(paths.checkpoint(name), "checkpoint", "state.json", json.dumps(state).encode(), step=step)
            event("saved", step=step)
files = sorted(paths.attempts.glob("*/metrics-*.jsonl"), key=lambda path: path.name)
parts = [{"path": path.relative_to(paths.root).as_posix()} for path in files]
commit(paths.final, "final", "model.safetensors", tensors(state["sum"]), metrics=parts, config={})
event("end", code=0)
