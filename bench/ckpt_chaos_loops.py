"""Try the independent tool ckpt-chaos on Hugging Face's Trainer and on Lightning, without skyspot and with it.

    make peers
    python -m bench.ckpt_chaos_loops [--points N] [--points-of-two N] [--points-without N] [--scripts A,B]
                                     [--processes 1,2] [--cold] [--state FILE] [--report FILE]
    python -m bench.ckpt_chaos_loops --points all --points-of-two all --state FILE      every crash point; an hour

The scripts are those of examples/ and examples/before/, which saves and resumes as its framework's documentation says.
Each start of a script is a fork of a process that has imported its libraries (bench/preloaded.py); with --cold it is a
Python of its own. --state FILE keeps what was found, and an interrupted bench continues from there. Exit status 1 means
that a script with skyspot did not recover exactly from a strike, or was not struck at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import machine, preloaded, sections
from bench.ckpt_chaos import TOOL, recovers, struck_by
from bench.report import table

EXAMPLES = sections.REPO / "examples"
MODES = ("before", "torn", "term")
GRACE_S = 25
"""Seconds between SIGTERM and the kill."""
ENV = {"STEPS": "45", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""They save at steps 20 and 40."""
LIGHTNING = {
    "    logger=False,": (
        "    callbacks=[lightning.pytorch.callbacks.ModelCheckpoint"
        '("output", every_n_train_steps=20, save_last=True)],\n    logger=False,'
    ),
    "DataLoader(validation, batch_size=64))": 'DataLoader(validation, batch_size=64), ckpt_path="last")',
    "torch.save(model.state_dict()": "if trainer.is_global_zero:\n    torch.save(model.state_dict()",
}
"""How people save and resume: what examples/before/lightning_module.py does not do."""
UNSAFE: dict[str, dict[str, str]] = {"hf_trainer": {}, "lightning_module": LIGHTNING}
"""The scripts, and what is changed in the ones without skyspot."""
RESULTS = {"hf_trainer": "model/model.safetensors", "lightning_module": "model.pt"}
PRELOADED = (
    "Each start is a fork of a process that has imported the script's libraries (`bench/preloaded.py`); `--cold` "
    "starts a new\n  Python each time."
)
COLD = "Each start is a new Python."
IN_FOLDER = ["sh", "-c", 'mkdir -p "$0" && cd "$0" && exec "$@"', "{out}"]


@dataclass(frozen=True)
class Tried:
    """What ckpt-chaos found out about a script."""

    by_mode: dict[str, tuple[int, int]]
    """The strikes from which it recovers exactly, and all."""
    is_same: bool
    """Two runs without a strike have the same result."""
    took_s: float

    @property
    def in_all(self) -> tuple[int, int]:
        each = self.by_mode.values()
        return sum(good for good, _ in each), sum(count for _, count in each)

    @property
    def holds(self) -> bool:
        """It was struck, and recovered from every strike."""
        good, count = self.in_all
        return self.is_same and good == count > 0


Found = dict[tuple[str, int, bool], Tried]
"""By script, number of processes, and whether it is with skyspot."""


def judged(results: Sequence[dict[str, Any]], took_s: float) -> Tried:
    """Count the strikes; a kill that never came is none."""
    by_mode: dict[str, tuple[int, int]] = {}
    for one in results:
        mode = one["point"][1] if "point" in one else None
        if mode and (one["crashed"] or mode == "term"):
            good, count = by_mode.get(mode, (0, 0))
            by_mode[mode] = good + recovers(one), count + 1
    return Tried(by_mode, any("point" not in one and recovers(one) for one in results), took_s)


def together(parts: Sequence[Tried]) -> Tried:
    """What was found out about a script, from its parts: one for each mode."""
    by_mode = {mode: counts for part in parts for mode, counts in part.by_mode.items()}
    return Tried(by_mode, all(part.is_same for part in parts), sum(part.took_s for part in parts))


@dataclass(frozen=True)
class Tool:
    """How ckpt-chaos is started, and how it starts a script."""

    path: Path
    python: Sequence[str]


def tried(tool: Tool, name: str, processes: int, is_ours: bool, mode: str, points: int, folder: Path) -> Tried:
    """Strike a script in one mode."""
    script, result = EXAMPLES / f"{name}.py", "run/final/model.safetensors"
    if not is_ours:
        script, result = folder / f"{name}.py", RESULTS[name]
        script.write_text(unsafe(name))
    options = [
        "--modes", mode, "--grace", GRACE_S, "--jobs", 2, "--max-points", points, "--timeout", 300,
        "--ranks", processes, "--result-file", f"{{out}}/{result}",
    ]  # fmt: skip
    command = ["env", "SKYSPOT_CHECKPOINT_DIR={out}/run", *IN_FOLDER, *tool.python, script]
    results, took = struck_by(tool.path, options, command, folder, ENV)
    if not results:
        raise SystemExit(f"{name}: ckpt-chaos struck nothing: {took.stderr[-2000:]}")
    for one in results:
        if not recovers(one):
            print(f"{name}, {processes}, {'with' if is_ours else 'without'}: {one['label']}: {one['outcome']}")
    return judged(results, took.wall_s)


def unsafe(name: str) -> str:
    """The script without skyspot."""
    text = (EXAMPLES / "before" / f"{name}.py").read_text()
    for old, new in UNSAFE[name].items():
        if text.count(old) != 1:
            raise SystemExit(f"examples/before/{name}.py has {old!r} {text.count(old)} times, not once")
        text = text.replace(old, new)
    return text


def described(found: Found) -> str:
    """The table, as Markdown."""
    rows = []
    for (name, processes, is_ours), one in found.items():
        counts = (*(one.by_mode.get(mode, (0, 0)) for mode in MODES), one.in_all)
        cells = [f"{good} of {count}" for good, count in counts]
        way = "with skyspot" if is_ours else "without"
        if not one.is_same:
            way += ", differs by itself"
        rows.append([f"`{name}.py`", str(processes), way, *cells, f"{one.took_s:.0f} s"])
    return table(["Script", "Processes", "", *MODES, "In all", "Time"], rows)


def report(found: Found, is_preloaded: bool, command: str, load: tuple[float, float]) -> str:
    """The part of the report, as Markdown."""
    return sections.paragraphs(
        "[ckpt-chaos](https://pypi.org/project/ckpt-chaos/) 0.1.8 strikes a run at file events, all of them or some "
        "that are evenly chosen, starts it again, and compares the trained model's bytes with those of a run without "
        "a strike. The table counts the strikes from which a script recovers exactly. Without skyspot, Hugging Face's "
        "Trainer saves every 20 steps and resumes from `get_last_checkpoint`; Lightning saves by "
        '`ModelCheckpoint(save_last=True)` and resumes by `ckpt_path="last"`. Each run has 45 steps.',
        described(found),
        f"- before: killed before the event. torn: the file is cut to half, then the kill. term: SIGTERM, {GRACE_S} s "
        "before the kill.\n- With 2 processes, rank 0 is struck, and the other is killed 3 s after its end.\n"
        f"- {PRELOADED if is_preloaded else COLD}",
        sections.when(command, load),
    )


class Kept:
    """What was found out so far; kept in a file, if there is one."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._parts: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}

    def get(self, key: str) -> Tried | None:
        """A part, if it was found out."""
        part = self._parts.get(key)
        if part is None:
            return None
        by_mode = {mode: (good, count) for mode, (good, count) in part["by_mode"].items()}
        return Tried(by_mode, part["is_same"], part["took_s"])

    def put(self, key: str, part: Tried) -> None:
        """Keep a part."""
        self._parts[key] = asdict(part)
        if self._file:
            self._file.write_text(json.dumps(self._parts, indent=1))


def number(text: str) -> int:
    """A number of strikes; `all`: more than there are file events."""
    return 1_000_000 if text == "all" else int(text)


def spread(points: int) -> dict[str, int]:
    """How many strikes each mode gets of so many in all; `all` is all for each."""
    return {mode: points // len(MODES) + (nth < points % len(MODES)) for nth, mode in enumerate(MODES)}


def in_each_mode(tool: Tool, name: str, processes: int, is_ours: bool, asked: str, kept: Kept) -> Tried:
    """Strike a script in one mode after the other; what is kept already is not done again."""
    parts = []
    for mode, points in spread(number(asked)).items():
        if points == 0:
            continue
        key = f"{name}, {processes}, {'with' if is_ours else 'without'}, {mode}, {asked}"
        part = kept.get(key)
        if part is None:
            with tempfile.TemporaryDirectory(prefix="skyspot-bench-") as folder:
                part = tried(tool, name, processes, is_ours, mode, points, Path(folder))
            kept.put(key, part)
        parts.append(part)
    return together(parts)


def main() -> int:
    """Try, print and report; returns 1 if a script with skyspot does not recover."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", type=Path, default=TOOL)
    parser.add_argument("--points", default="6", help="strikes on one process, three modes together, or all (6)")
    parser.add_argument("--points-of-two", default="3", help="strikes on two processes, or all (3)")
    parser.add_argument("--points-without", help="strikes on a script without skyspot (as many as with it)")
    parser.add_argument("--scripts", default=",".join(UNSAFE))
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--cold", action="store_true", help="start a Python of its own for each start of a script")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep what is found out here, and continue from it")
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE)
    options = parser.parse_args()
    command = f"python -m bench.ckpt_chaos_loops --points {options.points} --points-of-two {options.points_of_two}"
    if options.points_without:
        command += f" --points-without {options.points_without}"
    command += " --cold" if options.cold else ""
    found: Found = {}
    kept = Kept(options.state)
    before = machine.load()
    with ExitStack() as stack:
        python = [sys.executable]
        if not options.cold:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="skyspot-bench-"))
            python = stack.enter_context(preloaded.serving(Path(folder)))
        tool = Tool(options.tool.absolute(), python)
        for name in options.scripts.split(","):
            for processes in map(int, options.processes.split(",")):
                with_us = options.points if processes == 1 else options.points_of_two
                for is_ours in (False, True):
                    asked = with_us if is_ours else options.points_without or with_us
                    one = found[name, processes, is_ours] = in_each_mode(tool, name, processes, is_ours, asked, kept)
                    print(described({(name, processes, is_ours): one}), flush=True)
                    text = report(found, not options.cold, command, (before, machine.load()))
                    sections.put(options.report, sections.CKPT_CHAOS_LOOPS, text)  # Each time: it may be broken off.
    print(text)
    return int(not all(one.holds for (_, _, is_ours), one in found.items() if is_ours))


if __name__ == "__main__":
    sys.exit(main())
