"""The figures of a run, from its raw files alone: none of the report's code, and another way to count.

Preserved steps are those that the newest manifest lists; the report goes by what each attempt restored.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

TOLERANCE_S = 0.02
"""Times are recorded in milliseconds, and there are several for each attempt."""


@dataclass(frozen=True)
class ByHand:
    goodput: float
    total_s: float
    lost_steps: int
    usd: float
    on_demand_usd: float

    def compare(self, report: str) -> None:
        """Compare with what `skyspot report --json` printed."""
        found = json.loads(report)
        assert found["lost_steps"] == self.lost_steps
        assert found["times"]["total"] == pytest.approx(self.total_s, abs=TOLERANCE_S)
        assert found["goodput"] == pytest.approx(self.goodput, abs=TOLERANCE_S / self.total_s)
        assert found["spend"]["usd"] == pytest.approx(self.usd, rel=1e-3)
        assert found["spend"]["on_demand_usd"] == pytest.approx(self.on_demand_usd, rel=1e-2)
        assert found["spend"]["saving"] == pytest.approx(1 - self.usd / self.on_demand_usd, abs=0.02)


def by_hand(run: Path, spot: float, on_demand: float) -> ByHand:
    """The figures of a finished run of one node, all of whose attempts were on this machine."""
    attempts = [read(folder) for folder in sorted((run / "attempts").iterdir())]
    final = json.loads((run / "final" / "MANIFEST.json").read_text())
    preserved = [line for part in final["metrics"] for line in lines_of(run / part["path"])]
    steps = [line for line in preserved if "step_s" in line]
    evaluation_s = sum(line["eval_s"] for line in preserved if "step_s" not in line)
    assert sorted(line["step"] for line in steps) == list(range(1, final["step"] + 1))
    waits = sum(line.get("save_s", 0) + line.get("data_s", 0) for line in steps)
    productive = sum(line["step_s"] for line in steps) - waits
    spans = [(one["begin"], one["end"]) for one in attempts]
    gaps = [max(0.0, after[0] - before[1]) for before, after in pairwise(spans)]
    total = sum(end - begin for begin, end in spans) + sum(gaps)
    lost = sum(
        max(0, one["last_step"] - min(later["restored"] for later in attempts[number + 1 :]))
        for number, one in enumerate(attempts[:-1])
    )
    node_s = sum(one["end"] - one["begin"] + (0 if one["has_end"] else 60) for one in attempts)
    data_s = sum(line.get("data_s", 0) for line in steps)
    useful = productive + data_s + evaluation_s + attempts[0]["setup"]
    return ByHand(productive / total, total, lost, node_s / 3600 * spot, useful / 3600 * on_demand)


def lines_of(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # A machine was taken while it was written.
            found.append(json.loads(line))
    return found


def read(folder: Path) -> dict[str, Any]:
    """One attempt: when it began and ended on the monotonic clock of this machine, and its steps."""
    events = {path.stem.partition("-")[2]: json.loads(path.read_text()) for path in sorted(folder.glob("0*.json"))}
    lines = [line for path in sorted(folder.glob("metrics-*")) for line in lines_of(path)]
    progress = json.loads((folder / "progress.json").read_text()) if (folder / "progress.json").exists() else {}
    steps = [line for line in lines if "step_s" in line]
    records = [*events.values(), *lines, *([progress] if progress else [])]
    begin = events["start"]["monotonic"] - events["start"]["launched_s"]
    first = steps[0]["monotonic"] - steps[0]["step_s"]
    return {
        "begin": begin,
        "end": max(record["monotonic"] for record in records),
        "setup": first - begin - events["restored"]["seconds"],
        "restored": events["restored"]["step"],
        "last_step": max([steps[-1]["step"], progress.get("step", 0), events.get("end", {}).get("step") or 0]),
        "has_end": "end" in events,
    }
