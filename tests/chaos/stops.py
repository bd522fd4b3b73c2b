"""The campaign of stops: a tiny run is told to stop, in every phase and in every way; no step may be lost.

    python tests/chaos/stops.py                                 the whole campaign: 200 stops (make chaos)
    python tests/chaos/stops.py --stops 20                      its first 20
    python tests/chaos/stops.py --only 37                       one run again, up to that stop
    python tests/chaos/stops.py --plants                        plants mistakes in the code; each must be found
    python tests/chaos/stops.py --plants "exit 0,hold missing"  these alone

    python tests/chaos/stops.py --state FILE --report docs/chaos-results.md     also writes the results

Each stop comes at an event in its phase. Whether it fits its notice is stated before the run: a save is made to take so
many seconds, and they are less than the notice. --state FILE keeps the results, and an interrupted campaign continues
from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from stop_plan import EPISODE, MUST_FIT, SIGNAL_S, WHOLE, Stop, plan  # noqa: E402
from stop_plants import PLANTS  # noqa: E402
from stop_report import summary, write  # noqa: E402
from stop_scene import Scene, judge  # noqa: E402

Line = dict[str, Any]
"""What is kept of a stop: its plan, and what was seen."""


def episode(stops: list[Stop], folder: Path) -> list[Line]:
    """Stop one run again and again; it goes on after each stop. Ends at the first stop that goes wrong."""
    lines: list[Line] = []
    for stop in stops:
        control = folder / f"stop-{stop.number}"
        seen = Scene(stop, folder / "run", control).play()
        wrong = judge(stop, seen)
        if wrong:
            (control / "output.txt").write_text(seen.output)
        facts = dataclasses.asdict(seen)
        del facts["output"]
        lines.append({**dataclasses.asdict(stop), "fits": stop.fits, **facts, "wrong": wrong})
        print(said(lines[-1]), flush=True)
        if wrong:
            return lines
    shutil.rmtree(folder)
    return lines


ORDINARY = Stop(0, "an ordinary step", "SIGTERM to the launcher", 1, 0, SIGNAL_S, 0.0, "")


def planted(name: str, folder: Path) -> str | None:
    """Make a mistake in an attempt, and stop it; returns what the campaign finds, or None."""
    stop = dataclasses.replace(ORDINARY, **PLANTS[name].stop)
    return judge(stop, Scene(stop, folder / "run", folder / "control", name).play())


def all_found(names: list[str], folder: Path) -> bool:
    """Plant mistakes, and print what is found of each; True if each is found as such."""
    found = {name: planted(name, folder / name.replace(" ", "-")) for name in names}
    missed = [name for name in names if PLANTS[name].seen not in (found[name] or "")]
    for name in names:
        print(f"{name}: {'NOT found' if name in missed else 'found'}: {found[name]}")
    return not missed


def said(line: Line) -> str:
    """One line about a stop."""
    took = "" if line["seconds"] is None else f", gone after {line['seconds']:.1f} s of {line['notice_s']:g}"
    fits = "fits" if line["fits"] else "does not fit"
    ranks = f"{line['ranks']} rank{'s' * (line['ranks'] > 1)}"
    end = f"WRONG: {line['wrong']}" if line["wrong"] else f"{line['lost']} steps lost"
    return f"stop {line['number']}: {line['phase']}, {line['word']}, {ranks}, {fits}{took}: {end}"


def kept(state: Path | None, what: dict[str, Any]) -> dict[str, Any]:
    """The results so far of this campaign.

    Raises:
        SystemExit: the file belongs to another campaign.
    """
    if state is None or not state.exists():
        return {"what": what, "seconds": 0.0, "lines": []}
    found: dict[str, Any] = json.loads(state.read_text())
    if found["what"] != what:
        raise SystemExit(f"{state} belongs to another campaign ({found['what']}). Delete it to begin this one")
    return found


def keep(state: Path | None, results: dict[str, Any]) -> None:
    if state:
        state.with_suffix(".new").write_text(json.dumps(results))
        state.with_suffix(".new").replace(state)


def campaign(stops: list[Stop], workers: int, results: dict[str, Any], state: Path | None, folder: Path) -> None:
    """Run the episodes that are not over, several side by side; the results grow with each."""
    over = {line["number"] // EPISODE for line in results["lines"]}
    episodes = [stops[first : first + EPISODE] for first in range(0, len(stops), EPISODE)]
    todo = [one for one in episodes if one[0].number // EPISODE not in over]
    begun, before_s = time.monotonic(), results["seconds"]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(episode, one, folder / f"episode-{one[0].number // EPISODE}") for one in todo]
        for future in as_completed(futures):
            results["lines"] = sorted([*results["lines"], *future.result()], key=lambda line: line["number"])
            results["seconds"] = before_s + time.monotonic() - begun
            results["date"] = time.strftime("%Y-%m-%d", time.gmtime())
            keep(state, results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=WHOLE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep the results here, and continue from them")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results of a whole campaign here")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one run again, up to this stop")
    parser.add_argument("--plants", nargs="?", const=",".join(PLANTS), metavar="NAME,NAME", help="default: all")
    options = parser.parse_args()
    plants = options.plants.split(",") if options.plants else []
    if unknown := set(plants) - PLANTS.keys():
        parser.error(f"no such mistake: {', '.join(sorted(unknown))}. There are: {', '.join(PLANTS)}")
    folder = Path(tempfile.mkdtemp(prefix="skyspot-stops-"))
    if plants:
        found = all_found(plants, folder)
        shutil.rmtree(folder)
        return 0 if found else 1
    stops = plan(options.seed, options.stops)
    results = kept(options.state, {"seed": options.seed, "stops": options.stops})
    if options.only is not None:
        stops = plan(options.seed, options.only + 1)[options.only // EPISODE * EPISODE :]
        results["lines"] = episode(stops, folder / "episode")
    else:
        fit = sum(stop.fits for stop in stops)
        print(f"stated before the run: {fit} of {len(stops)} stops fit their notice", flush=True)
        campaign(stops, options.workers, results, options.state, folder)
    print(summary(results))
    wrong = [line for line in results["lines"] if line["wrong"]]
    for line in wrong:
        print(f"WRONG: {said(line)}\nreproduce it: python tests/chaos/stops.py --seed {options.seed} --only "
              f"{line['number']}\nleft in {folder}")  # fmt: skip
    if wrong and options.state:
        print(f"{options.state} keeps this failure: delete it once the bug is fixed, to start over")
    if not wrong:
        shutil.rmtree(folder, ignore_errors=True)
    if options.report:
        whole = len(results["lines"]) == WHOLE and sum(line["fits"] for line in results["lines"]) >= MUST_FIT
        if whole and not wrong:
            write(options.report, results)
            print(f"results written to {options.report}")
        else:
            print(f"{options.report}: not written; it needs a whole campaign without a wrong stop")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
