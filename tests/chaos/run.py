"""The fault campaign: strikes a tiny run again and again; after each fault, a restore must give what was saved.

    python tests/chaos/run.py                                 the whole campaign (make chaos)
    python tests/chaos/run.py --faults 100 --stores local     a part
    python tests/chaos/run.py --only local:1234               one episode again, up to that fault
    python tests/chaos/run.py --plants                        plants mistakes in the code; each must be found

    python tests/chaos/run.py --state FILE --report docs/chaos-results.md     also writes the results

--seed decides all draws. --state FILE keeps the counts, and an interrupted campaign continues from there. The report is
written once the whole campaign is over and every fault was survived. If FILE already holds such a campaign, no fault
strikes.
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
    parser.add_argument("--faults", type=int, help="faults for each store (default: as in the whole campaign)")
    parser.add_argument("--stores", default=",".join(NAMES))
    parser.add_argument("--kinds", metavar="KIND,KIND", help="only faults of these kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep the counts here, and continue from them")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results of a whole campaign here")
    parser.add_argument("--only", metavar="STORE:NUMBER")
    parser.add_argument("--plants", nargs="?", const=",".join(PLANTS), metavar="NAME,NAME", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="skyspot-chaos-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # torch creates it with the first DTensor.
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
                print(f"{store}: skipped: {reason}")
        counts = {store: options.faults or WHOLE[store] for store in stores if not missing(store)}
        jobs = jobs_for(counts, options.seed, only)
    tally = resumed(options.state, {"seed": options.seed, "faults": counts, "kinds": list(only)})
    begun = time.monotonic()
    interrupted = False
    try:
        campaign(jobs, options.workers, tally, options.state, folder)
    except KeyboardInterrupt:
        interrupted = True
        print(f"\ninterrupted{'; run the same command to continue' if options.state else ''}")
    print(f"\n{tally.table()}")
    count, hits = sum(tally.struck.values()), sum(tally.hit.values())
    print(f"{count} faults struck, {hits} hit, {len(tally.wrong)} not survived, in {time.monotonic() - begun:.0f} s")
    for line in tally.wrong:
        print(f"WRONG at {line['store']}:{line['number']} ({line['kind']}): {line['wrong']}\nleft in {folder}")
        kinds = f" --kinds '{options.kinds}'" if options.kinds else ""
        again = f"--seed {options.seed} --only {line['store']}:{line['number']}{kinds}"
        print(f"reproduce it: python tests/chaos/run.py {again}")
    if tally.wrong and options.state:
        print(f"{options.state} keeps this failure: delete it once the bug is fixed, to start over")
    if not tally.wrong:
        shutil.rmtree(folder, ignore_errors=True)
    if options.report:
        if is_whole(tally):
            write_report(options.report, tally)
            print(f"results written to {options.report}")
        else:
            print(f"{options.report}: not written; it needs a whole campaign whose faults were all survived")
    return 130 if interrupted else 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
