"""Records of runs that nobody trained: raw files, written without the trainer's code, at times that a test chooses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOON = 1_800_000_000.0
"""Unix seconds."""
LAUNCH = "local-12ab34cd"
"""No launch of SkyPilot's, so that nobody asks its server."""
PLACE = {"cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a", "nodes": 1}
ELSEWHERE = {"cloud": "GCP", "region": "us-central1", "nodes": 2}


@dataclass
class CraftedAttempt:
    """One attempt, whose records are written in seconds since its start event."""

    root: Path
    number: int
    starts_at: float
    """Unix seconds by its machine's clock."""
    boot: float = 1000.0
    """The monotonic clock at its start."""
    has_monotonic: bool = True
    events: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"a{self.number:04d}-{self.number:06x}"

    @property
    def folder(self) -> Path:
        found = self.root / "attempts" / self.name
        found.mkdir(parents=True, exist_ok=True)
        return found

    def times(self, at: float) -> dict[str, float]:
        return {"time": self.starts_at + at, **({"monotonic": self.boot + at} if self.has_monotonic else {})}

    def event(self, name: str, at: float, **fields: object) -> Path:
        self.events += 1
        path = self.folder / f"{self.events:04d}-{name}.json"
        path.write_text(json.dumps({**self.times(at), **fields}))
        return path

    def start(self, machine: str = "", launch: str = LAUNCH, **fields: object) -> Path:
        machine = machine or f"machine-{self.number}"
        return self.event("start", 0, launch=launch, machine=machine, **{"place": PLACE, **fields})

    def restored(self, step: int, at: float, seconds: float = 0.5) -> None:
        self.event("restored", at, step=step, seconds=seconds, lost_steps=0)

    def step(self, number: int, ended: float, step_s: float = 2.0, **fields: object) -> None:
        """A line of metrics, written at once, as the trainer does it."""
        monotonic = {"monotonic": self.boot + ended} if self.has_monotonic else {}
        self.line({"step": number, "loss": 1.0, "lr": 0.1, "step_s": step_s, **monotonic, **fields})

    def line(self, fields: dict[str, Any]) -> None:
        self.lines.append(fields)
        with self.metrics.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    @property
    def metrics(self) -> Path:
        return self.folder / f"metrics-{self.lines[0]['step']:010d}.jsonl"

    def steps(self, first: int, last: int, ended: float, step_s: float = 2.0, **fields: object) -> float:
        """Steps one right after the other, the first of which ends at `ended`; returns when the last one has ended."""
        for number in range(first, last + 1):
            self.step(number, ended + (number - first) * step_s, step_s, **fields)
        return ended + (last - first) * step_s

    def progress(self, step: int, at: float, **fields: object) -> None:
        (self.folder / "progress.json").write_text(json.dumps({**self.times(at), "step": step, **fields}))

    def saved(self, step: int, at: float, **fields: object) -> None:
        self.event("saved", at, step=step, checkpoint="x", **{"stall_s": 0.0, "commit_s": 1.0, **fields})

    def end(self, at: float, cause: str, code: int = 75, step: int | None = None, **fields: object) -> None:
        self.event("end", at, cause=cause, code=code, step=step, **fields)


def final(root: Path) -> None:
    """The run has finished."""
    (root / "final").mkdir()
    document = {"layout_version": 1, "kind": "final", "files": {}}
    (root / "final" / "MANIFEST.json").write_text(json.dumps(document))


def three_attempts(root: Path) -> list[CraftedAttempt]:
    """A run of 20 steps: a notice at step 10, a kill without a word after step 18, and the end."""
    first = CraftedAttempt(root, 1, NOON)
    first.start(setup_s=60, since_setup_s=10.0, launched_s=2.0)
    first.restored(0, 5)
    first.step(1, 12, data_s=0.1)
    first.event("first-step", 12.01, step=1, seconds=14.01)
    first.steps(2, 5, 14, data_s=0.1)
    first.saved(5, 22, stall_s=1.5)  # The boundary took a second; the step after it waited for half of one.
    first.step(6, 23, data_s=0.1, save_s=0.5)
    first.steps(7, 8, 25, data_s=0.1)
    first.line({"step": 8, "eval_loss": 1.0, "eval_s": 3.0, "monotonic": 1030.0})
    first.steps(9, 10, 32, data_s=0.1)
    first.event("notice", 34.2, kind="aws-notice", id="i", heard=NOON + 34.1, deadline=NOON + 154, step=10)
    first.event("save-begin", 34.2, step=10)
    first.saved(10, 36.2)
    first.end(36.5, "notice", step=10, committed_step=10, committed_s=2.1, notice={"kind": "aws-notice", "id": "i"})

    second = CraftedAttempt(root, 2, NOON + 336.5, boot=50.0)  # 200 s without a machine, then 100 s of set-up.
    second.start(setup_s=90, since_setup_s=10.0, launched_s=2.0, place=ELSEWHERE)
    second.restored(10, 4, seconds=1.0)
    second.steps(11, 17, 8)  # The last one ends at 20.
    second.saved(15, 17.5)
    second.progress(18, 22.5, max_steps=20)

    third = CraftedAttempt(root, 3, NOON + 659, boot=9.0)  # 200 s after the last record, again 100 s of set-up.
    third.start(setup_s=90, since_setup_s=10.0, launched_s=2.0)
    third.restored(15, 3)
    ended = third.steps(16, 20, 7)
    third.saved(20, ended + 1)
    third.end(ended + 2, "finished", 0, step=20, committed_step=20)
    final(root)
    return [first, second, third]
