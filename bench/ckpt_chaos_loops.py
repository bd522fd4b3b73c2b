"""Try the independent tool ckpt-chaos on Hugging Face's Trainer and on Lightning, without skyspot and with it.

    make peers
    python -m bench.ckpt_chaos_loops [--points N] [--points-of-two N] [--scripts A,B] [--processes 1,2] [--report FILE]

The scripts are those of examples/ and examples/before/, which saves and resumes as its framework's documentation says.
Exit status 1 means that a script with skyspot did not recover exactly from a strike, or was not struck at all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, sections, timed
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
IN_FOLDER = ["sh", "-c", 'mkdir -p "$0" && cd "$0" && exec "$@"', "{out}"]


@dataclass(frozen=True)
class Tried:
    """What ckpt-chaos found out about a script."""

    by_mode: dict[str, tuple[int, int]]
    """The strikes from which it recovers exactly, and all."""
    is_same: bool
    """Two runs without a strike have the same result."""
    took: timed.Timed

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


def judged(results: Sequence[dict[str, Any]], took: timed.Timed) -> Tried:
    """Count the strikes; a kill that never came is none."""
    by_mode = dict.fromkeys(MODES, (0, 0))
    for one in results:
        mode = one["point"][1] if "point" in one else None
        if mode and (one["crashed"] or mode == "term"):
            good, count = by_mode[mode]
            by_mode[mode] = good + recovers(one), count + 1
    return Tried(by_mode, any("point" not in one and recovers(one) for one in results), took)


def tried(tool: Path, name: str, processes: int, is_ours: bool, points: int, folder: Path) -> Tried:
    """Strike a script."""
    script, result = EXAMPLES / f"{name}.py", "run/final/model.safetensors"
    if not is_ours:
        script, result = folder / f"{name}.py", RESULTS[name]
        script.write_text(unsafe(name))
    options = [
        "--modes", ",".join(MODES), "--grace", GRACE_S, "--jobs", 2, "--max-points", points, "--timeout", 300,
        "--ranks", processes, "--result-file", f"{{out}}/{result}",
    ]  # fmt: skip
    command = ["env", "SKYSPOT_CHECKPOINT_DIR={out}/run", *IN_FOLDER, sys.executable, script]
    results, took = struck_by(tool, options, command, folder, ENV)
    if not results:
        raise SystemExit(f"{name}: ckpt-chaos struck nothing: {took.stderr[-2000:]}")
    for one in results:
        if not recovers(one):
            print(f"{name}, {processes}, {'with' if is_ours else 'without'}: {one['label']}: {one['outcome']}")
    return judged(results, took)


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
        cells = [f"{good} of {count}" for good, count in (*(one.by_mode[mode] for mode in MODES), one.in_all)]
        way = "with skyspot" if is_ours else "without"
        if not one.is_same:
            way += ", differs by itself"
        rows.append([f"`{name}.py`", str(processes), way, *cells, f"{one.took.wall_s:.0f} s"])
    return table(["Script", "Processes", "", *MODES, "In all", "Time"], rows)


def report(found: Found, command: str, load: tuple[float, float]) -> str:
    """The part of the report, as Markdown."""
    return sections.paragraphs(
        "[ckpt-chaos](https://pypi.org/project/ckpt-chaos/) 0.1.8 strikes a run at file events, evenly chosen from all "
        "of the run, starts it again, and compares the trained model's bytes with those of a run without a strike. The "
        "table counts the strikes from which a script recovers exactly. Without skyspot, Hugging Face's Trainer saves "
        "every 20 steps and resumes from `get_last_checkpoint`; Lightning saves by `ModelCheckpoint(save_last=True)` "
        'and resumes by `ckpt_path="last"`. Each run has 45 steps.',
        described(found),
        f"- before: killed before the event. torn: the file is cut to half, then the kill. term: SIGTERM, {GRACE_S} s "
        "before the kill.\n- With 2 processes, rank 0 is struck, and the other is killed 3 s after its end.",
        sections.when(command, load),
    )


def main() -> int:
    """Try, print and report; returns 1 if a script with skyspot does not recover."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", type=Path, default=TOOL)
    parser.add_argument("--points", type=int, default=6, help="strikes on one process, three modes together (6)")
    parser.add_argument("--points-of-two", type=int, default=3, help="strikes on two processes (3)")
    parser.add_argument("--scripts", default=",".join(UNSAFE))
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE)
    options = parser.parse_args()
    command = f"python -m bench.ckpt_chaos_loops --points {options.points} --points-of-two {options.points_of_two}"
    found: Found = {}
    before = machine.load()
    for name in options.scripts.split(","):
        for processes in map(int, options.processes.split(",")):
            points = options.points if processes == 1 else options.points_of_two
            for is_ours in (False, True):
                with tempfile.TemporaryDirectory(prefix="skyspot-bench-") as folder:
                    one = tried(options.tool.absolute(), name, processes, is_ours, points, Path(folder))
                found[name, processes, is_ours] = one
                print(described({(name, processes, is_ours): one}), flush=True)
                text = report(found, command, (before, machine.load()))
                sections.put(options.report, sections.CKPT_CHAOS_LOOPS, text)  # Each time: it may be broken off.
    print(text)
    return int(not all(one.holds for (_, _, is_ours), one in found.items() if is_ours))


if __name__ == "__main__":
    sys.exit(main())
