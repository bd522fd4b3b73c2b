"""Writes docs/chaos-results.md: the results of a whole campaign."""

from __future__ import annotations

from pathlib import Path

import stop_report
from stores import NAMES
from tally import Tally

CALLED = {
    "local-ranks": "local, one to three processes",
    "sequential-ranks": "sequential, one to three processes",
    "rclone": "rclone, no cache",
    "rclone-cached": "rclone, full cache, machine lost before the upload",
}
"""Descriptions of stores in the table of stores; the others appear by name."""


def write(path: Path, tally: Tally) -> None:
    """Write the report of a whole campaign; the results of the campaign of stops stay."""
    path.write_text(text(tally) + stop_report.earlier(path))


def text(tally: Tally) -> str:
    """Render the report as Markdown."""
    count, hits = sum(tally.struck.values()), sum(tally.hit.values())
    return "\n".join(
        [
            "# Results of the fault campaign",
            "",
            "`make chaos` writes this file at the end of a whole campaign. [checkpoints.md](checkpoints.md) describes",
            "the faults, and what is checked after each.",
            "",
            f"{_how(tally)}: **{count:,} faults{_duration(tally)}, {hits:,} of them hit, {len(tally.wrong)} not "
            "survived**. A fault",
            "hits if it comes in time and finds something to damage.",
            "",
            *_by_store(tally),
            "",
            "By kind of fault, struck / hit:",
            "",
            *_by_kind(tally),
            "",
        ]
    )


def _how(tally: Tally) -> str:
    """The seed, the date, the commit and the machine, as far as known."""
    ran = tally.ran
    parts = [f"Seed {tally.what['seed']}"]
    parts += [str(ran["date"])] if "date" in ran else []
    parts += [f"commit {ran['commit']}"] if "commit" in ran else []
    parts += [f"{ran['workers']} workers on {ran['cores']} cores"] if "workers" in ran else []
    return ", ".join(parts)


def _duration(tally: Tally) -> str:
    if "seconds" not in tally.ran:
        return ""
    minutes, seconds = divmod(round(tally.ran["seconds"]), 60)
    return f" in {minutes} min {seconds} s"


def _by_store(tally: Tally) -> list[str]:
    lines = ["| store | struck | hit | not survived |", "|---|---|---|---|"]
    for store in NAMES:
        keys = [key for key in tally.struck if key.startswith(f"{store}/")]
        struck, hit = sum(tally.struck[key] for key in keys), sum(tally.hit[key] for key in keys)
        wrong = sum(line["store"] == store for line in tally.wrong)
        lines.append(f"| {CALLED.get(store, store)} | {struck:,} | {hit:,} | {wrong} |")
    return lines


def _by_kind(tally: Tally) -> list[str]:
    lines = [f"| fault | {' | '.join(NAMES)} |", "|---" * (1 + len(NAMES)) + "|"]
    for kind in sorted({key.partition("/")[2] for key in tally.struck}, key=str.lower):
        keys = [f"{store}/{kind}" for store in NAMES]
        cells = [f"{tally.struck[key]} / {tally.hit[key]}" if key in tally.struck else "" for key in keys]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines
