"""Measure how soon a stop's last step is committed, with the model `tiny` in one process.

    python -m bench.stops [--stops N] [--report FILE]

One run is stopped again and again, in turn by SIGTERM and by AWS's notice (a metadata server on loopback), each time
after a while that is drawn from a seed. The attempts' own records tell when the notice was heard and when the
checkpoint was committed. Exit status 1 means that a median lies over the bound.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bench import machine, sections
from bench.report import table
from skyspot.rehearsal.metadata import AwsMetadata
from trainer.layout.events import event_named, read_events, read_metrics
from trainer.layout.names import RunPaths, list_attempts

BOUND_S = 1.0
SIGTERM, NOTICE = "SIGTERM", "AWS's notice"
NOTICE_S, POLL_S = 120, 0.2
LONGEST_S = 1.0
"""Training goes on for up to so long before it is stopped."""
MODULES = ["torch", "torch._dynamo", "transformers", "accelerate", "trainer.finetune.__main__"]
"""Loaded once, before the attempts are forked."""


@dataclass(frozen=True)
class Took:
    """The seconds of one stop."""

    commit_s: float
    """From the notice to the commit of the last step."""
    micro_step_s: float
    """A micro-step before it: the median of the attempt."""

    @property
    def beyond_s(self) -> float:
        """From the notice to the commit, without the micro-step that was under way."""
        return max(0.0, self.commit_s - self.micro_step_s)


def broken(found: Mapping[str, Sequence[Took]]) -> list[str]:
    """List the bounds that did not hold."""
    medians = {by: statistics.median(one.beyond_s for one in stops) for by, stops in found.items()}
    return [
        f"{by}: the last step is committed {median:.2f} s after the micro-step under way, bound {BOUND_S:g} s"
        for by, median in medians.items()
        if median > BOUND_S
    ]


def described(found: Mapping[str, Sequence[Took]]) -> str:
    """The table, as Markdown."""
    rows = []
    for by, stops in found.items():
        micro_step_s = statistics.median(one.micro_step_s for one in stops)
        whole, beyond = [one.commit_s for one in stops], [one.beyond_s for one in stops]
        rows.append([by, str(len(stops)), f"{1000 * micro_step_s:.0f} ms", _both(whole), _both(beyond)])
    return table(["The word", "Stops", "A micro-step", "Notice to commit", "Beyond the micro-step under way"], rows)


def _both(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s"


def measured(stops: int, folder: Path) -> dict[str, list[Took]]:
    """Stop a run so many times by each word."""
    # The first as the launcher sets it; half of the cores, as in the other benches.
    os.environ.update(GOMP_SPINCOUNT="5000", OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // 2)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    dice, paths = random.Random(0), RunPaths(folder / "run")
    found: dict[str, list[Took]] = {SIGTERM: [], NOTICE: []}
    for _ in range(stops):
        for by, so_far in found.items():
            with AwsMetadata() as server:
                _stop(context, paths, by, server, dice.uniform(0, LONGEST_S))
            so_far.append(took(paths))
    return found


def _stop(
    context: multiprocessing.context.ForkServerContext, paths: RunPaths, by: str, server: AwsMetadata, after_s: float
) -> None:
    """Run one attempt, and stop it so many seconds after its first step.

    Raises:
        SystemExit: it ended otherwise than by a stop.
    """
    ours, its = context.Pipe(duplex=False)
    env = {**server.env, "SKYSPOT_NOTICE_POLL_S": str(POLL_S)} if by == NOTICE else {"SKYSPOT_CLOUD": "none"}
    process = context.Process(target=_train, args=(its, paths.root, env))
    process.start()
    its.close()
    lines, was_told = [], False
    with os.fdopen(os.dup(ours.fileno()), errors="replace") as output:
        for line in output:
            lines.append(line)
            if line.startswith("step ") and not was_told:
                was_told = True
                time.sleep(after_s)
                _tell(by, server, process.pid or 0)
            if "holding until this machine is taken" in line:
                os.kill(process.pid or 0, signal.SIGTERM)
    process.join()
    if process.exitcode != 75:
        raise SystemExit(f"{by}: the attempt ended with {process.exitcode}\n{''.join(lines)}")


def _tell(by: str, server: AwsMetadata, pid: int) -> None:
    if by == SIGTERM:
        os.kill(pid, signal.SIGTERM)
    else:
        server.announce(NOTICE_S)


def _train(output: Connection, run_dir: Path, env: Mapping[str, str]) -> None:
    """Train `tiny` in this process until it is stopped; what it prints goes into the pipe. Never returns."""
    from trainer.finetune.__main__ import main

    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.environ.update(env, HOME=str(run_dir.parent))
    arguments = ["--checkpoint-dir", str(run_dir), "--max-steps", "1000000", "--save-every", "1000000", "--cpu"]
    main([*arguments, "--allow-config-change", "max_steps"])


def took(paths: RunPaths) -> Took:
    """Read what the last attempt recorded of its stop.

    Raises:
        SystemExit: the last step was not committed.
    """
    attempt = list_attempts(paths)[-1]
    events = read_events(paths, attempt)
    start, end = (event_named(events, name) or {} for name in ("start", "end"))
    config = start["config"]
    lines = [
        line for part in sorted(paths.attempt(attempt).glob("metrics-*")) for line in read_metrics(part.read_bytes())
    ]
    step_s = statistics.median(float(line["step_s"]) for line in lines if "step_s" in line)
    if end["committed_step"] != end["step"]:
        raise SystemExit(f"step {end['step']} was not committed before the deadline")
    micro_steps = config["global_batch_size"] // config["micro_batch_size"]
    return Took(end["committed_s"], step_s / micro_steps)


def main() -> int:
    """Measure, and write the report; returns 1 if the bound does not hold."""
    parser = argparse.ArgumentParser(description="Measure how soon a stop's last step is committed.")
    parser.add_argument("--stops", type=int, default=15, help="by each word (15)")
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE, help="file for the report")
    options = parser.parse_args()
    before = machine.load()
    with tempfile.TemporaryDirectory(prefix="skyspot-bench-") as folder:
        found = measured(options.stops, Path(folder))
    text = sections.paragraphs(
        sections.when("python -m bench.stops", (before, machine.load())),
        "The bundled trainer with the model `tiny`, in one process, on a local disk. It is stopped at any moment of "
        "its training. The time runs from when the notice was heard to the commit of the last step, as the attempt's "
        "event `end` records it: the median, and the slowest stop. It includes the rest of the step, which is finished "
        f"first. Bound: beyond the micro-step under way, the median is at most {BOUND_S:g} s.",
        described(found),
    )
    return sections.report(options.report, sections.STOPS, text, broken(found))


if __name__ == "__main__":
    sys.exit(main())
