"""The fault campaign: a tiny run, struck again and again; after each fault, is what is restored exactly what was saved?

    python tests/chaos/run.py                                 the whole of it (make chaos)
    python tests/chaos/run.py --faults 100 --stores local     a part
    python tests/chaos/run.py --only local:1234               one episode again, up to that fault
    python tests/chaos/run.py --plants                        mistakes planted in the code; each has to be found

    python tests/chaos/run.py --state FILE --report docs/chaos-results.md     also writes the results

Seeded by --seed; --state FILE keeps count, and a campaign that was interrupted goes on from there. The report is
written once the whole campaign is over and no fault was wrong; if FILE holds such a campaign, nothing is struck.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from campaign import EPISODE, PLANT_FAULTS, WHOLE, Job, campaign, is_whole, jobs_for, planted
from plants import PLANTS
from report import write as write_report
from stores import NAMES, missing
from tally import resumed


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, help="for each store; default: the whole campaign's")
    parser.add_argument("--stores", default=",".join(NAMES))
    parser.add_argument("--kinds", metavar="KIND,KIND", help="only these kinds of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", type=Path, metavar="FILE", help="keeps the count; the campaign goes on from there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the results of a whole campaign go")
    parser.add_argument("--only", metavar="STORE:NUMBER")
    parser.add_argument("--plants", nargs="?", const=",".join(PLANTS), metavar="NAME,NAME", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="skyspot-chaos-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # torch makes it when a tensor is first cut.
    only = tuple(options.kinds.split(",")) if options.kinds else ()
    if options.plants:
        found = {
            name: planted(name, options.seed, only, options.workers, folder / name.replace(" ", "-"))
            for name in options.plants.split(",")
        }
        for name, line in found.items():
            print(line or f"{name}: NOT FOUND in {PLANT_FAULTS} faults")
        shutil.rmtree(folder, ignore_errors=True)
        return 0 if all(found.values()) else 1
    if options.only:
        store, _, number = options.only.partition(":")
        counts = {store: 1}
        jobs = [Job(store, int(number) // EPISODE, options.seed, int(number) % EPISODE + 1, "", only)]
    else:
        stores = [store for store in options.stores.split(",") if store]
        for store in stores:
            if reason := missing(store):
                print(f"{store}: left out, {reason}")
        counts = {store: options.faults or WHOLE[store] for store in stores if not missing(store)}
        jobs = jobs_for(counts, options.seed, only)
    tally = resumed(options.state, {"seed": options.seed, "faults": counts, "kinds": list(only)})
    begun = time.monotonic()
    interrupted = False
    try:
        campaign(jobs, options.workers, tally, options.state, folder)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted{'; the same command goes on from here' if options.state else ''}")
    print(f"\n{tally.table()}")
    count, hits = sum(tally.struck.values()), sum(tally.hit.values())
    print(f"{count} faults struck, {hits} hit, {len(tally.wrong)} not survived, in {time.monotonic() - begun:.0f} s")
    for line in tally.wrong:
        print(f"WRONG at {line['store']}:{line['number']} ({line['kind']}): {line['wrong']}\nleft in {folder}")
        kinds = f" --kinds '{options.kinds}'" if options.kinds else ""
        again = f"--seed {options.seed} --only {line['store']}:{line['number']}{kinds}"
        print(f"again: python tests/chaos/run.py {again}")
    if tally.wrong and options.state:
        print(f"{options.state} keeps this: delete it once the fault is mended, to begin anew")
    if not tally.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    if options.report:
        if is_whole(tally):
            write_report(options.report, tally)
            print(f"results written to {options.report}")
        else:
            print(f"{options.report}: not written, this is not the whole campaign, or not all was survived")
    return 130 if interrupted else 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
