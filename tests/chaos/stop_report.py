"""Writes the section "Stops" of docs/chaos-results.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from stop_plan import PHASES, WORDS

HEADING = "\n## Stops\n"


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the section, in place of an earlier one."""
    faults = path.read_text().partition(HEADING)[0] if path.exists() else ""
    path.write_text(faults + text(results))


def earlier(path: Path) -> str:
    """The section as the file has it; empty if it has none."""
    _, heading, section = path.read_text().partition(HEADING) if path.exists() else ("", "", "")
    return heading + section


def summary(results: dict[str, Any]) -> str:
    """The result in one line."""
    lines = results["lines"]
    fit = [line for line in lines if line["fits"]]
    return (
        f"{len(lines)} stops, {len(fit)} fit their notice, {sum(line['lost'] for line in fit)} steps lost in those, "
        f"{sum(bool(line['wrong']) for line in lines)} wrong"
    )


def text(results: dict[str, Any]) -> str:
    """Render the section as Markdown."""
    lines = results["lines"]
    fit = [line for line in lines if line["fits"]]
    others = [line for line in lines if not line["fits"]]
    commits = [line["committed_s"] for line in fit if line["committed_s"] is not None]
    over = max(line["seconds"] - line["notice_s"] for line in lines)
    minutes, seconds = divmod(round(results["seconds"]), 60)
    return "\n".join(
        [
            HEADING,
            "The second part of `make chaos` tells a tiny run on 1 to 4 ranks to stop. "
            "[checkpoints.md](checkpoints.md) describes how.",
            "",
            f"Seed {results['what']['seed']}, {results['date']}: **{len(lines)} stops in {minutes} min {seconds} s. "
            f"{len(fit)} fit their notice, as stated before the run; {sum(line['lost'] for line in fit)} steps were "
            "lost in those**.",
            f"In the {len(others)} others, a save takes longer than the notice: "
            f"{sum(line['lost'] for line in others)} steps were lost. Every exit code was",
            "right, every checkpoint whole, and no process was left.",
            f"From the word to the commit: median {statistics.median(commits):.1f} s, at most {max(commits):.1f} s "
            f"({len(commits)} stops). The attempt that took longest was gone {_past(over)}.",
            "",
            *_table(lines, "phase", PHASES),
            "",
            *_table(lines, "word", tuple(WORDS)),
            "",
        ]
    )


def _past(seconds: float) -> str:
    return f"{seconds:.1f} s after the end of its notice" if seconds > 0 else "before its notice was over"


def _table(lines: list[dict[str, Any]], key: str, values: tuple[str, ...]) -> list[str]:
    rows = [f"| {key} | stops | fit | steps lost in those | wrong |", "|---|---|---|---|---|"]
    for value in values:
        those = [line for line in lines if line[key] == value]
        fit = [line for line in those if line["fits"]]
        wrong = sum(bool(line["wrong"]) for line in those)
        rows.append(f"| {value} | {len(those)} | {len(fit)} | {sum(line['lost'] for line in fit)} | {wrong} |")
    return rows
