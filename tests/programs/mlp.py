"""A small plain-torch model through SpotRun: the program that most tests of exactness run, and break on purpose.

python -m trainer.launch --processes 3 tests/programs/mlp.py --dir RUN [--fault kill@7] [--without order]
"""

import argparse
import copy
import itertools
import os
import signal
import threading
import time
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path

from trainer.config import RunConfig
from trainer.layout import LayoutError, read_manifest
from trainer.run import SpotRun


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=lambda text: None if text == "auto" else int(text), default=4)
    parser.add_argument("--keep-every", type=int, default=0)
    parser.add_argument("--save-failures", type=int, default=3)
    parser.add_argument("--slow-save", type=float, default=0.0, help="seconds more for each save")
    parser.add_argument("--hold-copy", action="store_true", help="a copy begins after the next forward pass has")
    parser.add_argument("--meddle", action="store_true", help="a model that changes its weights in its forward pass")
    parser.add_argument("--eval-every", type=int, default=0)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--micro", type=int, default=3)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--keep-latest", type=int, default=3)
    parser.add_argument("--grace", type=float, default=20.0)
    parser.add_argument("--peer-timeout", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--allow", action="append", default=[])
    parser.add_argument("--fault", action="append", default=[], help="WHAT@STEP, done once, by the rank --fault-rank")
    parser.add_argument("--fault-rank", type=int, default=0)
    parser.add_argument("--commit-first", action="store_true", help="a kill waits for the saves under way")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds more for each micro-step")
    parser.add_argument("--bind-patience", type=float, default=None)
    parser.add_argument("--prepare", type=float, default=0.0, help="seconds that rank 0 prepares something")
    parser.add_argument("--constant", action="append", default=[], help="MODULE.NAME=SECONDS of trainer, shortened")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument(
        "--overflow-at", type=int, default=None, help="a step whose loss is too large for half precision"
    )
    parser.add_argument("--batch-norm", action="store_true", help="a model with buffers that each rank fills by itself")
    parser.add_argument("--late-check", action="store_true", help="rank 0 looks at its save once it is decided")
    parser.add_argument("--ema", action="store_true", help="an average of the weights, registered as an extra")
    parser.add_argument("--lazy", action="store_true", help="a model with a parameter that has no shape yet")
    parser.add_argument("--late-read-back", type=int, metavar="N", help="the N-th ends after all else")
    parser.add_argument("--hang-in-read-back", action="store_true")
    parser.add_argument("--unreadable", default="", help="ERRNO:TIMES[:STEP] that a share cannot be opened")
    parser.add_argument("--last-to-say", action="store_true", help="rank 1 says why it ends when another rank is gone")
    parser.add_argument("--unexportable", default="", help="ERRNO:TIMES that a file of final/ cannot be made")
    parser.add_argument("--without", choices=["throw-away", "rng", "order", "lr"])
    return parser.parse_args()


options = parse()
config = RunConfig(
    checkpoint_dir=options.dir,
    max_steps=options.steps,
    global_batch_size=options.batch,
    micro_batch_size=options.micro,
    seed=options.seed,
    save_interval_steps=options.save_every,
    eval_interval_steps=options.eval_every,
    precision=options.precision,
    keep_latest=options.keep_latest,
    keep_every=options.keep_every,
    save_failures=options.save_failures,
    grace_s=options.grace,
    peer_timeout_s=options.peer_timeout,
    allow_config_change=tuple(options.allow),
    cpu=True,
)


begun: list[int] = []
"""The steps of which a save has begun; its folder is made a little later."""


def is_committed(folder: Path) -> bool:
    with suppress(LayoutError, OSError):  # It is there before it is written.
        return bool(read_manifest(folder).files)
    return False


def take_machine() -> None:
    """End everything at once, as a reclaimed machine does: the launcher dies, and its ranks with it."""
    if options.commit_first:
        end = time.monotonic() + 60
        while begun and not any(map(is_committed, (options.dir / "checkpoints").glob(f"{begun[-1]:010d}-*"))):
            assert time.monotonic() < end
            time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class Faults:
    """What goes wrong, and when: at how many steps done, or (`KIND:POINT@N`) in its N-th save or read-back."""

    def __init__(self) -> None:
        self.left = [(what, int(step)) for what, _, step in (fault.partition("@") for fault in options.fault)]

    def at(self, count: int, point: str = "") -> None:
        if int(os.environ.get("RANK", "0")) != options.fault_rank:
            return
        for what, when in list(self.left):
            if when != count or what.partition(":")[2] != point:
                continue
            self.left.remove((what, when))
            kind = what.partition(":")[0]
            if kind in ("sigterm", "sigint"):
                os.kill(os.getppid(), getattr(signal, kind.upper()))
                # So short are the steps here that the word could come after the last.
                run.notices.heard.wait(10)
            elif what == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what.startswith("stop"):
                request = run.paths.stop(os.environ["SKYSPOT_LAUNCH"])
                request.parent.mkdir(exist_ok=True)
                request.touch()
                while not run.records.stop_requested:
                    time.sleep(0.01)
            elif kind == "outnumber":
                (run.paths.attempts / "a0099-ffffff").mkdir()
            elif what == "raise":
                raise ValueError("a bug of the program's own")
            else:
                take_machine()


faults = Faults()
if options.bind_patience is not None:
    from trainer import together

    together.BIND_PATIENCE_S = options.bind_patience
for constant in options.constant:
    name, _, value = constant.partition("=")
    module, _, name = name.partition(".")
    module = import_module(f"trainer.{module}")
    setattr(module, name, type(getattr(module, name))(float(value)))

with SpotRun(config, binding={"model": f"mlp-{options.hidden}", "global_batch_size": options.batch,
                              "seed": options.seed, "max_steps": options.steps, "lr": options.lr}) as run:  # fmt: skip
    import numpy as np
    import torch
    from torch import nn

    from trainer import checkpoint, export, loop, pruning, rng, saving, staging

    start_save = saving.Saver.start

    def start(self, boundary) -> None:
        begun.append(boundary.step)
        start_save(self, boundary)

    saving.Saver.start = start
    check_save = saving.Saver.check

    def check(self) -> None:
        if options.late_check and run.rank == 0:
            while not self.idle:
                time.sleep(0.01)
        check_save(self)

    saving.Saver.check = check

    class Numbers:
        """Samples that are a pure function of their number."""

        def __len__(self) -> int:
            return options.samples

        def batch(self, ids):
            rows = [np.random.Generator(np.random.PCG64(int(number))).standard_normal(17) for number in ids]
            table = torch.tensor(np.array(rows), dtype=torch.float32)
            return {"x": table[:, :16], "y": (table[:, :16].sum(1) > 0).long()}

        def weight(self, batch) -> int:
            return len(batch["y"])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = options.hidden
            self.body = nn.Sequential(
                nn.Linear(16, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.LayerNorm(width),
                nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2),
            )  # fmt: skip
            if options.batch_norm:
                self.body.insert(1, nn.BatchNorm1d(width))
            if options.lazy:
                self.body.append(nn.LazyLinear(2))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            if self.training:
                self.seen += 1
            if options.meddle:
                with torch.no_grad():
                    for parameter in self.parameters():
                        parameter.mul_(1.0)
                forward.set()
            return self.body(x)

    def loss(model, batch):
        faults.at(run.steps_done)
        if not model.training:
            faults.at(run.steps_done, "eval")
        time.sleep(options.slow)
        total = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")
        return total * 1e30 if model.training and run.steps_done == options.overflow_at else total

    def prepare() -> None:
        end = time.monotonic() + options.prepare
        while time.monotonic() < end:
            run.between()
            time.sleep(0.05)

    if options.prepare:
        faults.at(0, "prepare")
        run.rank0_does("prepare", prepare)
    saves = [0]

    def at_point(point: str) -> None:
        saves[0] += point == "folder-made"
        time.sleep(options.slow_save if point == "folder-made" else 0)
        faults.at(saves[0], point)

    checkpoint.at_point = at_point
    real_problem = pruning.problem

    reads = itertools.count(1)

    def read_back(folder, manifest, past_cache):
        number = next(reads)
        faults.at(number, "read-back")
        if number == options.late_read_back:
            while not run.final_is_whole:
                time.sleep(0.01)
            time.sleep(2)  # Nothing else is left to be done.
        if options.hang_in_read_back:
            threading.Event().wait()
        return real_problem(folder, manifest, past_cache)

    pruning.problem = read_back
    forward = threading.Event()
    if options.hold_copy:
        real_run = staging.Copy.run

        def run_later(copy):
            forward.clear()
            forward.wait(5)
            real_run(copy)

        staging.Copy.run = run_later
    if options.unreadable:
        number, times, *step = options.unreadable.split(":")
        failures = [OSError(int(number), os.strerror(int(number)))] * int(times)
        of = f"{int(step[0]):010d}-" if step else ""
        real_open = Path.open

        def open_(path, mode="r", *args, **more):
            if "r" in mode and path.name.startswith("share-") and path.parent.name.startswith(of) and failures:
                raise failures.pop()
            return real_open(path, mode, *args, **more)

        Path.open = open_
    if options.last_to_say and run.rank == 1:
        first_to_say = run._first_to_say
        run._first_to_say = lambda what: run.peer_gone.wait(60) and first_to_say(what)
    if options.unexportable:
        number, times = map(int, options.unexportable.split(":"))
        refusals = [OSError(number, os.strerror(number))] * times
        real_write = export.write_tensors

        def write(target, tensors, metadata=None):
            faults.at(run.steps_done, "export")
            if refusals:
                raise refusals.pop()
            return real_write(target, tensors, metadata)

        export.write_tensors = write

    torch.manual_seed(options.seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    def lr_factor(step: int) -> float:
        return 1.0 - step / (options.steps + 1)

    # Each of these takes away one of the rules that make a resume exact.
    if options.without == "throw-away":
        loop.Loop.throw_away_pass = lambda self: None
    if options.without == "rng":
        rng.seeded = lambda seed: nullcontext()
    if options.without == "order":
        calls = {"first": None}
        real = loop.step_ids

        def from_the_front(seed, n_samples, global_batch_size, step):
            if run.steps_done and calls["first"] is None:
                calls["first"] = run.steps_done
            return real(seed, n_samples, global_batch_size, step - (calls["first"] or 0))

        loop.step_ids = from_the_front
    if options.without == "lr":
        local = {"step": 0}

        def lr_factor(step: int) -> float:
            local["step"] += 1
            return 1.0 - local["step"] / (options.steps + 1)

    extra = {}
    if options.ema:
        extra["ema"] = average = copy.deepcopy(model)

        def follow(*_: object) -> None:
            with torch.no_grad():
                for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(new, 0.2)

        optimizer.register_step_post_hook(follow)

    run.train(
        model,
        optimizer,
        extra=extra,
        samples=Numbers(),
        held_out=Numbers() if options.eval_every else None,
        loss=loss,
        lr_factor=lr_factor,
    )
