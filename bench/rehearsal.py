"""Measure how long a rehearsal takes, beside the script that it rehearses.

    python -m bench.rehearsal [--rounds N] [--seconds S] [--report FILE]

Four scripts compute for 10 s and save every quarter of a second: one is right, one writes its checkpoint in place, one
saves half of its state, one trains with `SpotRun` on a store that its task names, so that the bucket is served through
FUSE while records tell of the steps. Each is run by itself and then rehearsed with the defaults, in turn. The bound
that the project holds itself to: a rehearsal takes at most 6 times as long as its script. Exit status 1 means that it
did not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import machine, sections, timed
from bench.report import table
from skyspot.rehearsal.machine import bucketfs_missing

BOUND = 6.0
SAVES = 40
SCRIPTS = {
    "renames its checkpoint (right)": "rename",
    "writes it in place (wrong)": "in-place",
    "saves half of its state (wrong)": "half",
    "SpotRun on a named store (right)": "records",
}
SCRIPT = """\
import os, pathlib, pickle, sys, zlib

out, saves, work = pathlib.Path(os.environ["OUT"]), int(os.environ["SAVES"]), int(os.environ["WORK"])
out.mkdir(parents=True, exist_ok=True)
block, kept = bytes(1 << 20), out / "state.pkl"
done, total = pickle.loads(kept.read_bytes())[:2] if kept.exists() else (0, 0)
while done < saves:
    for number in range(work):
        total = zlib.crc32(block, total + number)
    done += 1
    state = pickle.dumps((done, 0 if os.environ["HOW"] == "half" else total, block))
    if os.environ["HOW"] == "in-place":
        kept.write_bytes(state)
    else:
        (out / "state.tmp").write_bytes(state)
        (out / "state.tmp").replace(kept)
(out / "result.txt").write_text(str(total))
"""
RECORDS = """\
import os, pathlib, zlib

import torch

from trainer import SpotRun

out, saves, work = pathlib.Path(os.environ["OUT"]), int(os.environ["SAVES"]), int(os.environ["WORK"])
block, total = bytes(1 << 20), 0
torch.manual_seed(0)
with SpotRun(out, save_every=1) as run:
    model = torch.nn.Linear(512, 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.register(model=model, optimizer=optimizer)
    for batch in run.steps(torch.utils.data.DataLoader(torch.randn(saves, 512)), until=saves):
        for number in range(work):
            total = zlib.crc32(block, total)
        loss = (model(batch) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss)
    run.finish()
"""
TASK = """\
name: own
resources: {{use_spot: true}}
envs: {{OUT: /checkpoints/own, SAVES: "{saves}", WORK: "{work}", HOW: {how}}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT{store}}}
  ~/code/script.py: {script}
run: |
  python ~/code/script.py
"""


@dataclass(frozen=True)
class Pair:
    """A script by itself, and its rehearsal."""

    alone: timed.Timed
    rehearsed: timed.Timed

    @property
    def ratio(self) -> float:
        return self.rehearsed.wall_s / self.alone.wall_s


def once(folder: Path, script: Path, how: str, work: int) -> Pair:
    """Run the script, and rehearse it."""
    records = how == "records"
    env = {"OUT": str(folder / "own"), "SAVES": str(SAVES), "WORK": str(work), "HOW": how}
    (folder / "own").mkdir()
    alone = timed.run([sys.executable, script], folder, env)
    store = ", store: s3" if records else ""
    (folder / "task.yaml").write_text(TASK.format(saves=SAVES, work=work, how=how, script=script, store=store))
    options = [] if records else ["--compare", "own/result.txt", "--mount-like", "local"]
    rehearsed = timed.run([sys.executable, "-m", "skyspot", "rehearse", "task.yaml", *options, "--json"], folder)
    if alone.code or rehearsed.code != (how in ("in-place", "half")):
        said = f"{alone.stderr}{rehearsed.stderr}{rehearsed.stdout}"
        raise SystemExit(f"{how}: exit {alone.code} alone, {rehearsed.code} rehearsed\n{said}")
    return Pair(alone, rehearsed)


def calibrate(folder: Path, script: Path, seconds: float) -> int:
    """How often the script has to sum up a MiB for each save, to take that long."""
    took = {}
    for work in (100, 300):
        with _fresh(folder) as place:
            env = {"OUT": str(place / "own"), "SAVES": "4", "WORK": str(work), "HOW": "rename"}
            took[work] = timed.run([sys.executable, script], place, env).cpu_s
    unit_s = max(1e-6, (took[300] - took[100]) / (4 * 200))
    return max(1, round(seconds / SAVES / unit_s))


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)


def described(pairs: dict[str, list[Pair]]) -> str:
    """The table, as Markdown."""
    rows = []
    for title, found in pairs.items():
        legs = [leg for pair in found[:1] for leg in json.loads(pair.rehearsed.stdout)["legs"]]
        attempts = sum(len(leg["rows"]) for leg in legs)
        rows.append(
            [
                title,
                *(f"{statistics.median(one(pair) for pair in found):.1f} s" for one in _COLUMNS),
                str(attempts),
                f"{statistics.median(pair.ratio for pair in found):.2f}x",
                " ".join(f"{pair.ratio:.2f}" for pair in sorted(found, key=lambda pair: pair.ratio)),
            ]
        )
    header = ["The script", "Alone", "CPU", "Rehearsed", "CPU", "Attempts", "Ratio", "All ratios"]
    return table(header, rows)


_COLUMNS = (
    lambda pair: pair.alone.wall_s,
    lambda pair: pair.alone.cpu_s,
    lambda pair: pair.rehearsed.wall_s,
    lambda pair: pair.rehearsed.cpu_s,
)


def main() -> int:
    """Measure, print and report; returns 1 if the bound does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE)
    options = parser.parse_args()
    if missing := bucketfs_missing():
        print(f"The time of a rehearsal: not measured: {missing}")
        return 0
    pairs: dict[str, list[Pair]] = {title: [] for title in SCRIPTS}
    before = machine.load()
    with tempfile.TemporaryDirectory(prefix="skyspot-bench-") as name:
        folder = Path(name)
        script, records = folder / "script.py", folder / "records.py"
        script.write_text(SCRIPT)
        records.write_text(RECORDS)
        work = calibrate(folder, script, options.seconds)
        for _ in range(options.rounds):
            for title, how in SCRIPTS.items():
                with _fresh(folder) as place:
                    pairs[title].append(once(place, records if how == "records" else script, how, work))
    ratio = max(statistics.median(pair.ratio for pair in found) for found in pairs.values())
    holds = "holds" if ratio <= BOUND else "does **not** hold"
    text = sections.paragraphs(
        "`skyspot rehearse` with its defaults (5 preemptions), beside the script by itself. Medians of "
        f"{options.rounds} rounds. The bound is {BOUND:g}x, and it {holds}.",
        described(pairs),
        sections.when(f"python -m bench.rehearsal --rounds {options.rounds}", (before, machine.load())),
    )
    print(text)
    sections.put(options.report, sections.REHEARSAL, text)
    return int(ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())
