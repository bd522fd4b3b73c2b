"""Measure the cost of a checkpoint to training, beside torch.save, accelerate and torch.distributed.checkpoint.

    make bench
    python -m bench.checkpoint --size 1GB --rounds 5

Writes docs/performance.md. At 1 GB it takes 15 minutes, 9 GB of memory and 8 GB of disk space.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench import cgroup, machine, report, sections
from bench.report import Figures, Ranks, Short
from bench.sections import REPO
from bench.sizes import shown, size
from bench.worker import LOADERS, SAVERS, Loading, Saving, Worker, WorkerError, prepare

OWN_BYTES = 64 << 20
"""Memory for the process in the test with little memory, besides half a copy of the state."""


def main() -> int:
    """Measure, and write the report; returns 1 if a bound does not hold."""
    options = _parse()
    prepare()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-") as name:
        folder = Path(name)
        figures = Figures(
            command=f"python -m bench.checkpoint {' '.join(sys.argv[1:])}".strip(),
            date=time.strftime("%Y-%m-%d", time.gmtime()),
            machine=machine.describe(folder),
            load=(machine.load(), 0.0),
            state_bytes=options.size,
            rounds=options.rounds,
            threads=options.threads,
            asked_s=options.forward_backward,
        )
        _save_and_load(figures, folder, options.forward_backward)
        for scale in options.scales:
            for ranks in options.ranks:
                figures.ranks.append(
                    _together(figures, folder, int(scale * options.size), ranks, options.forward_backward)
                )
        figures.short = _in_short_memory(figures, folder)
    figures.load = (figures.load[0], machine.load())
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(sections.joined(report.written(figures), sections.later(options.report)))
    if options.json:
        options.json.write_text(json.dumps(asdict(figures), indent=1))
    print(report.written(figures))
    print(f"written to {options.report}", file=sys.stderr)
    broken = report.broken(figures)
    for line in broken:
        print(f"does not hold: {line}", file=sys.stderr)
    return 1 if broken else 0


def _parse() -> argparse.Namespace:
    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description="Measure the cost of a checkpoint to training, beside other ways to save."
    )
    parser.add_argument("--size", type=size, default="1GB", help="bytes of model and optimizer state (1GB)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one to warm up (5)")
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE, help="file for the report")
    parser.add_argument("--json", type=Path, help="file for all figures as JSON")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (the system's temporary folder)")
    parser.add_argument(
        "--forward-backward",
        type=float,
        default=0.5,
        metavar="S",
        help="minimum duration of forward and backward (0.5)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 1) // 2),
        help="threads that training computes on (half the cores)",
    )
    parser.add_argument(
        "--scales", type=numbers, default=[0.25, 1, 2], help="sizes for --ranks, as factors of --size (0.25,1,2)"
    )
    parser.add_argument("--ranks", type=numbers, default=[1, 2], help="numbers of ranks that save together (1,2)")
    return parser.parse_args()


def _save_and_load(figures: Figures, folder: Path, forward_backward_s: float) -> None:
    """Measure each way to save and to load."""
    workers = {
        way: Worker(Saving, way, folder / str(index), figures.state_bytes, figures.threads)
        for index, way in enumerate(SAVERS)
    }
    batch = 0
    for way, worker in workers.items():
        batch = batch or worker.ask("calibrate", forward_backward_s)
        figures.forward_backward.append(worker.ask("warm", batch)["forward_backward"])
        figures.first_stall[way], steps = worker.ask("first")
        figures.steps, figures.saves[way] = max(figures.steps, steps + 1), []
        _log(f"{way}: the first save stalls {figures.first_stall[way]:.3f} s, {steps} steps beside it")
    for number in range(1 + figures.rounds):
        for way, worker in workers.items():
            found = worker.ask("round", figures.steps, number % 2 == 0)
            found["commit"] = worker.ask("commit")
            if number:
                figures.saves[way].append(found)
                figures.step_s.append(found["step"])
            _log(f"{number} {way}: " + ", ".join(f"{what} {value:.3f}" for what, value in found.items()))
    kept = {}
    for way, worker in workers.items():
        figures.extra_bytes[way] = worker.ask("extra_bytes")
        kept[way] = worker.ask("kept")
        worker.close()
    for number in range(1 + figures.rounds):
        for way, (saved, _) in LOADERS.items():
            loading = Worker(Loading, way, figures.state_bytes)
            took, alone_s = loading.ask("once", *kept[saved])
            loading.close()
            if number:
                figures.loads.setdefault(way, []).append(took)
                figures.load_alone += [] if alone_s is None else [alone_s]
            _log(f"{number} {way}: {took:.3f} s")


def _together(figures: Figures, folder: Path, state_bytes: int, ranks: int, forward_backward_s: float) -> Ranks:
    """Measure several ranks of one training that save together."""
    ranks = int(ranks)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        command = [
            sys.executable, "-m", "trainer.launch", "--processes", str(ranks), str(REPO / "bench" / "ranks.py"),
            "--size", f"{state_bytes / 1e6}MB", "--rounds", str(figures.rounds),
            "--threads", str(max(1, figures.threads // ranks)),
            "--forward-backward", str(forward_backward_s), "--folder", name, "--out", name,
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(REPO), "SKYSPOT_PROCESSES": ""}
        done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        each = [json.loads(Path(name, f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    _log(f"{shown(state_bytes)}, {ranks} ranks: {each}")
    return Ranks(state_bytes, each)


def _in_short_memory(figures: Figures, folder: Path) -> Short | None:
    """Measure a save with half the memory that a copy takes; None if no limit can be set."""
    group = cgroup.make("skyspot-bench")
    if group is None:
        return None
    worker = Worker(Saving, report.OURS, folder / "short", figures.state_bytes, figures.threads, group)
    short = Short(f"a control group (version {group.version})", figures.state_bytes // 2 + OWN_BYTES)
    try:
        worker.ask("warm", 8)
        worker.ask("limit_memory", group, short.spare_bytes)
        short.stall_s, _ = worker.ask("first")
        short.printed, short.extra_bytes = worker.ask("printed"), worker.ask("extra_bytes")
    except WorkerError as error:
        short.trouble = str(error)
    finally:
        worker.close()
        group.remove()
    _log(f"little memory: {short}")
    return short


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
