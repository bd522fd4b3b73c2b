"""One rank of a training in which every rank holds the whole state and saves its share of it.

    PYTHONPATH=. python -m trainer.launch --processes 2 bench/ranks.py --size 1GB --rounds 5 ...

Each rank writes its figures to OUT/rank-N.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from bench.ours import Ours
from bench.sizes import size
from bench.training import Training, keep_freed_memory
from bench.worker import peak_bytes, reset_peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=size, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--forward-backward", type=float, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    keep_freed_memory()
    training = Training(options.size, options.threads)
    ours = Ours(options.folder, training)
    group = ours.group
    training.calibrate(options.forward_backward)
    training.batch = max(row[0] for row in group.exchange([training.batch]).wait())
    training.step()
    reset_peak()
    for _ in range(3):
        group.exchange([0]).wait()
        training.step()
    without, stalls, commits, rank = peak_bytes(), [], [], group.rank
    reset_peak()
    ours.prepare()
    training.step()
    for count in range(1 + options.rounds):
        group.exchange([0]).wait()
        begun = time.perf_counter()
        ours.save(1 + count)
        stall_s = time.perf_counter() - begun
        over = False
        while not over:
            training.step(ours.before_step)
            over = all(row[0] for row in group.exchange([int(ours.over())]).wait())
        ours.settle()
        stalls.append(stall_s + ours.saver.stall_s - ours.saver.begun_s)
        commits.append(ours.saver.commit_s or 0.0)
    found = {
        "first_stall": stalls[0],
        "stall": statistics.median(stalls[1:]),
        "commit": statistics.median(commits[1:]),
        "staged": ours.share_bytes()[rank],
        "extra": peak_bytes() - without,
        "forward_backward": min(training.forward_backward() for _ in range(2)),
    }
    group.exchange([0]).wait()
    (options.out / f"rank-{rank}.json").write_text(json.dumps(found))
    group.mark_left()
    group.await_others_left(10)


if __name__ == "__main__":
    main()
