"""Try the independent tool ckpt-chaos and `skyspot rehearse --every-write` on the same scripts, one after the other.

    make peers
    python -m bench.ckpt_chaos [--tool .venv-peers/bin/ckpt-chaos] [--points N] [--scripts A,B] [--report FILE]

ckpt-chaos kills a run at file events of the whole run, by default at 40 of them; skyspot strikes at every call of one
save. Two places are the same if the same thing is about to happen to a file of the same name, numbers apart. Exit
status 1 means that ckpt-chaos found a place that skyspot did not, or was faster.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, sections, timed
from bench.report import table
from skyspot.rehearsal.machine import bucketfs_missing

TOOL = sections.REPO / ".venv-peers" / "bin" / "ckpt-chaos"
FOLDER = sections.REPO / "tests" / "programs" / "scripts"
SCRIPTS = {
    "two_files": "final.pt",
    "four_files": "result.json",
    "newest_by_number": "result.json",
    "rng_ignored": "result.json",
    "renamed_over": "result.json",
}
"""The scripts, and the results that are compared."""
TASK = """\
name: own
resources: {{use_spot: true}}
envs: {{OUT: /checkpoints/own, OMP_NUM_THREADS: "1"}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT}}
  ~/code/{script.name}: {script}
run: |
  python ~/code/{script.name}
"""
REHEARSE = ["--mount-like", "local", "--processes", "1", "--kinds", "kill-at-write", "--every-write", "--json"]
ABOUT = {"open": "open", "torch.save": "open", "os.rename": "rename", "os.remove": "unlink", "os.mkdir": "mkdir"}
"""What is about to happen at a file event of ckpt-chaos."""
PLACE = re.compile(r"(before|in the middle of|after) the (\w+) (?:of|to) (\S+)")


@dataclass(frozen=True, order=True)
class Place:
    """Where a strike falls: the same for both tools."""

    file: str
    """The file's name, with # for a number."""
    about: str
    """What is about to happen to it: open, write, close, rename, unlink, mkdir; `torn`: it is half written."""


@dataclass(frozen=True)
class Tried:
    """What one tool found out about one script."""

    strikes: int
    failing: tuple[Place, ...]
    """Where the script does not recover exactly, each place once."""
    failed: int
    """How many of the strikes these are."""
    took: timed.Timed


def theirs(tool: Path, script: Path, result: str, points: int, folder: Path) -> Tried:
    """Try ckpt-chaos with its defaults."""
    command = ["env", "OUT={out}", "OMP_NUM_THREADS=1", sys.executable, script]
    struck, took = struck_by(tool, ["--max-points", points, "--result-file", f"{{out}}/{result}"], command, folder)
    struck = [one for one in struck if "point" in one]
    if not struck:
        raise SystemExit(f"{script.name}: ckpt-chaos struck nothing: {took.stderr[-2000:]}")
    failed = [one for one in struck if not recovers(one)]
    places = (their_place(one["event"][0], one["event"][1], one["point"][1]) for one in failed)
    return Tried(len(struck), tuple(sorted(set(places))), len(failed), took)


def struck_by(
    tool: Path, options: Sequence[object], command: Sequence[object], folder: Path, env: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], timed.Timed]:
    """Run ckpt-chaos; returns its results in their order, the run without a crash among them."""
    took = timed.run([tool, "run", *options, "--work", folder / "work", "--", *command], folder, env)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("work/pt_*/result.json"))], took


def recovers(one: dict[str, Any]) -> bool:
    """Whether the command went on after a strike of ckpt-chaos, to the result of a run without."""
    return not one["outcome"]["raised"] and not one["outcome"]["weights_diff"]


def their_place(event: str, name: str, mode: str) -> Place:
    """Where a strike of ckpt-chaos falls."""
    return Place(_numberless(name), "torn" if mode == "torn" else ABOUT.get(event, event))


def ours(script: Path, result: str, folder: Path) -> Tried:
    """Strike at every call of a save."""
    (folder / "task.yaml").write_text(TASK.format(script=script))
    took = timed.run(
        [sys.executable, "-m", "skyspot", "rehearse", "task.yaml", "--compare", f"own/{result}", *REHEARSE], folder
    )
    if took.code not in (0, 1):
        raise SystemExit(f"{script.name}: {took.stderr}")
    rows = [row for row in json.loads(took.stdout)["kinds"] if row["place"]]
    failed = [our_place(row["place"]) for row in rows if row["outcome"] in ("NOT exact", "stays down", "LOST WORK")]
    return Tried(len(rows), tuple(sorted(set(failed))), len(failed), took)


def our_place(description: str) -> Place:
    """Where a strike of a rehearsal falls, from its description."""
    found = PLACE.match(description)
    if not found:
        raise SystemExit(f"no place: {description!r}")
    when, call, path = found.groups()
    # A file that was emptied, or that has its first pages, is as torn as one that is cut in half.
    about = "torn" if call == "write" else {"create": "open", "emptying": "open"}.get(call, call)
    return Place(_numberless(path.rpartition("/")[2]), f"after {call}" if when == "after" else about)


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def missed(their: Sequence[Place], our: Sequence[Place]) -> list[Place]:
    """Places that fail for ckpt-chaos and not for skyspot."""
    return [place for place in their if place not in our]


def described(found: dict[str, tuple[Tried, Tried]]) -> str:
    """The table, as Markdown."""
    apart = any(
        {place.file for place in their.failing} - {place.file for place in our.failing} for their, our in found.values()
    )
    rows = []
    for name, (their, our) in found.items():
        names = [{place.file for place in one.failing} for one in (their, our)]
        alone = sorted(names[0] - names[1])
        rows.append(
            [
                f"`{name}.py`",
                f"{their.failed} of {their.strikes}",
                str(len(their.failing)),
                f"{our.failed} of {our.strikes}",
                str(len(missed(their.failing, our.failing))),
                ", ".join(f"`{file}`" for file in sorted(names[0] & names[1])) or "none",
                *([", ".join(f"`{file}`" for file in alone)] if apart else []),
                f"{their.took.wall_s:.0f} s",
                f"{our.took.wall_s:.0f} s",
                f"{our.took.wall_s / their.took.wall_s:.2f}x",
                f"{their.took.cpu_s:.0f}, {our.took.cpu_s:.0f} s",
            ]
        )
    header = [
        "Script", "ckpt-chaos", "places", "skyspot", "missed", "Files that both name",
        *(["ckpt-chaos alone"] if apart else []), "ckpt-chaos", "skyspot", "ratio", "CPU",
    ]  # fmt: skip
    return table(header, rows)


def report(found: dict[str, tuple[Tried, Tried]], points: int, load: tuple[float, float]) -> str:
    """The part of the report, as Markdown."""
    return sections.paragraphs(
        "[ckpt-chaos](https://pypi.org/project/ckpt-chaos/) 0.1.8 kills a run at up to "
        f"{points} file events of the whole run, before the event or when the file is half written. "
        "`skyspot rehearse --kinds kill-at-write --every-write` strikes at every call of one save. Both ran the "
        "scripts of `tests/programs/scripts`, one after the other.",
        described(found),
        "- The first columns: strikes from which the script does not recover exactly. `places`: the same event of the "
        "same file,\n  whatever its number, counts once.\n"
        "- Missed: places that fail for ckpt-chaos and not for skyspot.",
        sections.when(f"python -m bench.ckpt_chaos --points {points}", load),
    )


def main() -> int:
    """Try both, print and report; returns 1 if ckpt-chaos found more or was faster."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", type=Path, default=TOOL)
    parser.add_argument("--points", type=int, default=40, help="ckpt-chaos's --max-points")
    parser.add_argument("--scripts", default=",".join(SCRIPTS))
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE)
    options = parser.parse_args()
    if missing := bucketfs_missing():
        print(f"skyspot beside ckpt-chaos: not measured: {missing}")
        return 0
    found: dict[str, tuple[Tried, Tried]] = {}
    before = machine.load()
    for name in options.scripts.split(","):
        script = FOLDER / f"{name}.py"
        with tempfile.TemporaryDirectory(prefix="skyspot-bench-") as place:
            their_folder, our_folder = Path(place, "theirs"), Path(place, "ours")
            their_folder.mkdir()
            our_folder.mkdir()
            their = theirs(options.tool.absolute(), script, SCRIPTS[name], options.points, their_folder)
            found[name] = their, ours(script, SCRIPTS[name], our_folder)
        print(described({name: found[name]}), flush=True)
        for one in missed(their.failing, found[name][1].failing):
            print(f"missed in {name}: {one}", flush=True)
    text = report(found, options.points, (before, machine.load()))
    print(text)
    sections.put(options.report, sections.CKPT_CHAOS, text)
    slower = [name for name, (their, our) in found.items() if our.took.wall_s > their.took.wall_s]
    for name in slower:
        print(f"{name}: ckpt-chaos was faster", file=sys.stderr)
    return int(bool(slower) or any(missed(their.failing, our.failing) for their, our in found.values()))


if __name__ == "__main__":
    sys.exit(main())
