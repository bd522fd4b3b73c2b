"""The count of a campaign's faults, by store and kind, and the file that keeps it (--state)."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stores import NAMES

COUNTS = ("struck", "hit", "restored", "none")


@dataclass
class Tally:
    """The faults of a campaign so far, counted by store and kind."""

    struck: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    restored: Counter[str] = field(default_factory=Counter)
    none: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    """The faults that were not survived."""
    done: set[tuple[str, int]] = field(default_factory=set)
    """(store, number) of each episode that is over."""
    what: dict[str, Any] = field(default_factory=dict)
    """Identifies the campaign: its seed, the number of faults for each store, its kinds of fault."""
    ran: dict[str, Any] = field(default_factory=dict)
    """How it ran, as far as known: `seconds`, `workers`, `cores`, `date`, `commit`."""

    def add(self, line: dict[str, Any]) -> None:
        """Count a fault, or an episode that is over."""
        if "done" in line:
            self.done.add((line["store"], line["done"]))
            return
        key = f"{line['store']}/{line['kind']}"
        self.struck[key] += 1
        self.hit[key] += line["hit"]
        self.restored[key] += line["restored"] is not None
        self.none[key] += line["restored"] is None
        if line["wrong"]:
            self.wrong.append(line)

    def table(self) -> str:
        """All counts, as a table for the terminal."""
        lines = [f"{'store':14} {'fault':32} {'struck':>7} {'hit':>7} {'restored':>13} {'none':>6} {'WRONG':>6}"]
        for store in NAMES:
            for key in sorted(key for key in self.struck if key.startswith(f"{store}/")):
                wrong = sum(f"{line['store']}/{line['kind']}" == key for line in self.wrong)
                kind = key.partition("/")[2]
                counts = (self.struck[key], self.hit[key], self.restored[key], self.none[key], wrong)
                lines.append(f"{store:14} {kind:32} " + "{:7} {:7} {:13} {:6} {:6}".format(*counts))
        return "\n".join(lines)


def keep(tally: Tally, state: Path | None) -> None:
    """Write the tally to its file, if it has one."""
    if state:
        counts = {name: dict(getattr(tally, name)) for name in COUNTS}
        more = {"done": sorted(tally.done), "wrong": tally.wrong, "what": tally.what, "ran": tally.ran}
        state.with_suffix(".new").write_text(json.dumps({**counts, **more}))
        state.with_suffix(".new").replace(state)


def resumed(state: Path | None, what: dict[str, Any]) -> Tally:
    """Read the tally that a file keeps. Unfinished episodes run again; their earlier counts stay in the tally.

    Raises:
        SystemExit: the file belongs to another campaign.
    """
    if state is None or not state.exists():
        return Tally(what=what)
    kept = json.loads(state.read_text())
    if kept.get("what") != what:
        raise SystemExit(f"{state} belongs to another campaign ({kept.get('what')}). Delete it to begin this one")
    counters = {name: Counter(kept[name]) for name in COUNTS}
    done = {(store, number) for store, number in kept["done"]}
    written = time.strftime("%Y-%m-%d", time.gmtime(state.stat().st_mtime))
    return Tally(**counters, done=done, wrong=kept["wrong"], what=what, ran=kept.get("ran", {"date": written}))
