"""k-means on made-up points; it prints its progress, and writes its centres when it is over.

Its fault: there is no checkpoint. Every preemption is a new beginning.
"""

import csv
import os
import random
import time
from pathlib import Path

K, ROUNDS = 4, 90


def nearest(point, centres):
    return min(range(K), key=lambda k: sum((a - b) ** 2 for a, b in zip(point, centres[k], strict=True)))


def main():
    dice = random.Random(6)
    points = [(dice.gauss(dice.randrange(3), 0.4), dice.gauss(0, 1)) for _ in range(120)]
    centres = dice.sample(points, K)
    for step in range(ROUNDS):
        some = dice.sample(points, 60)
        groups = [[] for _ in range(K)]
        for point in some:
            groups[nearest(point, centres)].append(point)
        for k, group in enumerate(groups):
            if group:
                mean = [sum(axis) / len(group) for axis in zip(*group, strict=True)]
                centres[k] = tuple(0.8 * old + 0.2 * new for old, new in zip(centres[k], mean, strict=True))
        time.sleep(0.02)
        if step % 10 == 0:
            print(f"round {step}: {[len(group) for group in groups]}", flush=True)
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    with (out / "centres.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("x", "y"), *centres])


if __name__ == "__main__":
    main()
