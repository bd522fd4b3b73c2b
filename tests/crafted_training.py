"""The records of a long training that nobody ran: machines of three places, losses that fall, every way to end."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from crafted import NOON, CraftedAttempt, final

PLACES = [
    {"cloud": "AWS", "region": "us-east-1", "zone": "us-east-1d", "instance_type": "p4d.24xlarge",
     "usd_per_hour": 9.83, "on_demand_usd_per_hour": 32.77, "rung": 1},
    {"cloud": "GCP", "region": "us-central1", "zone": "us-central1-b", "instance_type": "a2-highgpu-8g",
     "usd_per_hour": 8.82, "on_demand_usd_per_hour": 29.39, "rung": 2},
    {"cloud": "AWS", "region": "us-west-2", "zone": "us-west-2c", "instance_type": "p4d.24xlarge",
     "usd_per_hour": 11.57, "on_demand_usd_per_hour": 32.77, "rung": 1},
]  # fmt: skip
NO_WORD, NOTICE, SIGNAL = "no word", "notice", "signal"
ENDS = [NOTICE, NO_WORD, NOTICE, SIGNAL, NO_WORD]
EVALUATION_S, SAVE_S = 90.0, 4.0


def training(
    root: Path, *, attempts: int = 7, steps: int = 2400, step_s: float = 30.0, save_every: int = 40,
    evaluate_every: int = 400, seed: int = 3, is_finished: bool = True, has_values: bool = True,
) -> Path:  # fmt: skip
    """A run of `steps` steps of `step_s` seconds, whose attempts end as ENDS says, and the last one at its end."""
    rng = random.Random(seed)
    cuts = [*sorted(rng.sample(range(save_every + 1, steps), attempts - 1)), steps]
    at, restored = NOON, 0
    for number, last in enumerate(cuts, 1):
        one = CraftedAttempt(root, number, at + 300.0)
        one.start(setup_s=280, since_setup_s=20.0, launched_s=9.0, place={"nodes": 1, **PLACES[rng.randrange(3)]},
                  config={"max_steps": steps})  # fmt: skip
        one.restored(restored, 40, seconds=12.0)
        end = "finished" if last == steps and is_finished else "" if last == steps else ENDS[(number - 1) % len(ENDS)]
        ended = _steps(one, range(restored + 1, last + 1), steps, step_s, save_every, evaluate_every, rng, has_values)
        restored = _end(one, end, ended, restored, last, save_every)
        at = one.starts_at + ended + 30 + rng.choice([60, 120, 400, 1500])
    if is_finished:
        final(root)
    return root


def _steps(
    one: CraftedAttempt, numbers: range, steps: int, step_s: float, save_every: int, evaluate_every: int,
    rng: random.Random, has_values: bool,
) -> float:  # fmt: skip
    """Write all lines and saves; returns when the last one has ended."""
    at, waited, lines = 45.0, 0.0, []
    for step in numbers:
        seconds = step_s * rng.uniform(0.95, 1.05) + waited
        at += seconds
        line = {"step": step, "step_s": seconds, "data_s": seconds * 0.02, "monotonic": one.boot + at}
        if waited:
            line["save_s"] = waited
        if has_values:
            line["loss"] = 2.1 + 6.5 * math.exp(-step / (steps / 7)) + rng.gauss(0, 0.06)
            line["lr"] = 3e-4 * min(step / (steps / 20), 0.55 + 0.45 * math.cos(math.pi * step / steps))
        lines.append(line)
        waited = 0.0
        if step % save_every == 0:
            one.saved(step, at + SAVE_S, stall_s=SAVE_S)
            waited = SAVE_S
        if evaluate_every and step % evaluate_every == 0:
            at += EVALUATION_S
            lines.append({"step": step, "eval_loss": 2.5, "eval_s": EVALUATION_S, "monotonic": one.boot + at})
    one.lines += lines
    one.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return at


def _end(one: CraftedAttempt, end: str, ended: float, restored: int, last: int, save_every: int) -> int:
    """Write how it ended; returns the step that the next attempt restores."""
    if not end:
        one.progress(last, ended)
    if end in ("", NO_WORD):
        return max(restored, last // save_every * save_every)
    notice = {}
    if end in (NOTICE, SIGNAL):
        kind = "aws-notice" if end == NOTICE else "sigterm"
        notice = {"notice": {"kind": kind}, "committed_s": 6.5}
        one.event("notice", ended + 0.1, kind=kind, heard=one.starts_at + ended, step=last)
        one.event("save-begin", ended + 0.2, step=last)
    one.saved(last, ended + 6.5)
    one.end(ended + 7, end, 0 if end == "finished" else 75, step=last, committed_step=last, **notice)
    return last
