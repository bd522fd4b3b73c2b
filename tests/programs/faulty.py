"""mlp.py beside it, and what goes wrong with it: the program that most tests of exactness run, and break on purpose.

python -m trainer.launch --processes 3 tests/programs/faulty.py --dir RUN [--fault kill@7] [--without order]

mlp.py itself knows nothing of this: what it imports by name is replaced by what does the same, with faults.
"""

import argparse
import copy
import itertools
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path

import mlp
import psutil
import torch
from at_limit import reach_limit
from torch import nn

from trainer.checkpoint import pruning, saving, staging, writing
from trainer.layout.documents import LayoutError
from trainer.layout.manifest import read_manifest
from trainer.ranks import rendezvous
from trainer.training import computation, export, rng, samples
from trainer.training.starting import default_binding


def steps_or_auto(text: str) -> int | None:
    return None if text == "auto" else int(text)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The faults, and what is left of the command line for mlp.py."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    config = parser.add_argument_group("RunConfig, where it is not as mlp.py makes it")
    config.add_argument("--save-every", type=steps_or_auto, dest="save_interval_steps")
    config.add_argument("--keep-every", type=int)
    config.add_argument("--save-failures", type=int)
    config.add_argument("--eval-every", type=int, dest="eval_interval_steps")
    config.add_argument("--micro", type=int, dest="micro_batch_size")
    config.add_argument("--precision")
    config.add_argument("--keep-latest", type=int)
    config.add_argument("--grace", type=float, dest="grace_s")
    config.add_argument("--peer-timeout", type=float, dest="peer_timeout_s")
    config.add_argument("--seed", type=int)
    config.add_argument("--report-to")
    config.add_argument("--allow", action="append", dest="allow_config_change")
    changed, rest = parser.parse_known_args()

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--hidden", type=int, default=32, help="the width of the model; binds")
    parser.add_argument("--lr", type=float, default=0.01, help="binds")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--fault", action="append", default=[], help="WHAT@STEP, done once, by the rank --fault-rank")
    parser.add_argument("--fault-rank", type=int, default=0)
    parser.add_argument("--commit-first", action="store_true", help="a kill waits for the saves under way")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds more for each micro-step")
    parser.add_argument("--slow-save", type=float, default=0.0, help="seconds more for each save")
    parser.add_argument("--outlast", type=float, help="seconds that the first save goes on while training waits for it")
    parser.add_argument("--hold-copy", action="store_true", help="a copy begins after the next forward pass has")
    parser.add_argument("--meddle", action="store_true", help="a model that changes its weights in its forward pass")
    parser.add_argument("--bind-patience", type=float, default=rendezvous.BIND_PATIENCE_S)
    parser.add_argument("--prepare", type=float, default=0.0, help="seconds that rank 0 prepares something")
    parser.add_argument("--constant", action="append", default=[], help="MODULE.NAME=SECONDS of trainer, shortened")
    parser.add_argument("--overflow-at", type=int, help="a step whose loss is too large for half precision")
    parser.add_argument("--batch-norm", action="store_true", help="a model with buffers that each rank fills by itself")
    parser.add_argument("--lazy", action="store_true", help="a model with a parameter that has no shape yet")
    parser.add_argument("--ema", action="store_true", help="an average of the weights, registered as an extra")
    parser.add_argument("--late-check", action="store_true", help="rank 0 looks at its save once it is decided")
    parser.add_argument("--late-read-back", type=int, metavar="N", help="the N-th ends after all else")
    parser.add_argument("--hang-in-read-back", action="store_true")
    parser.add_argument("--unreadable", default="", help="ERRNO:TIMES[:STEP] that a share cannot be opened")
    parser.add_argument("--last-to-say", action="store_true", help="rank 1 says why it ends when another rank is gone")
    parser.add_argument("--unexportable", default="", help="ERRNO:TIMES that a file of final/ cannot be made")
    parser.add_argument("--without", choices=["throw-away", "rng", "order", "lr"])
    options, rest = parser.parse_known_args(rest)
    options.config = vars(changed)
    if "allow_config_change" in changed:
        options.config["allow_config_change"] = tuple(changed.allow_config_change)
    return options, rest


options, rest = parse()
begun: list[int] = []
"""The steps of which a save has begun; its folder is made a little later."""
forward = threading.Event()
"""A forward pass has begun."""
awaited = threading.Event()
"""Training waits for a save."""


class Run(mlp.SpotRun):
    """SpotRun, and the faults of one attempt."""

    def __init__(self, config):
        super().__init__(config, {"model": f"mlp-{options.hidden}", "lr": options.lr, **default_binding(config)})

    def __enter__(self):
        super().__enter__()
        self.faults = Faults(self)
        watch_saves(self)
        watch_reads(self)
        watch_export(self)
        take_rule_away(self)
        return self

    def train(self, model, optimizer, *, samples, loss, lr_factor):
        def faulty_loss(model, batch):
            self.faults.at(self.steps_done)
            if not model.training:
                self.faults.at(self.steps_done, "eval")
            time.sleep(options.slow)
            total = loss(model, batch)
            return total * 1e30 if model.training and self.steps_done == options.overflow_at else total

        if options.prepare:
            self.faults.at(0, "prepare")
            self.rank0_does("prepare", lambda: prepare(self))
        for group in optimizer.param_groups:
            group["lr"] = options.lr
        optimizer.register_step_post_hook(lambda *_: self.faults.at(self.steps_done, "optimizer"))
        if options.meddle:
            model.register_forward_pre_hook(meddle)
        super().train(
            model,
            optimizer,
            samples=samples,
            loss=faulty_loss,
            lr_factor=local_lr(self.config.max_steps) if options.without == "lr" else lr_factor,
            held_out=samples if self.config.eval_interval_steps else None,
            extra={"ema": average_of(model, optimizer)} if options.ema else {},
        )

    def _is_first_to_print(self, what: str) -> bool:
        if options.last_to_say and self.rank == 1 and not self.peer_gone.wait(60):
            return False
        return super()._is_first_to_print(what)


class Net(nn.Module):
    """The model with a buffer that counts its forward passes, and what some models have besides."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if options.batch_norm:
            self.body.insert(1, nn.BatchNorm1d(options.hidden))
        if options.lazy:
            self.body.append(nn.LazyLinear(2))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.body(x)


def meddle(model, _) -> None:
    """Change the weights, to what they were."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0)
    forward.set()


def average_of(model, optimizer):
    """A moving average of the weights, in a model of its own."""
    average = copy.deepcopy(model)

    def follow(*_: object) -> None:
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 0.2)

    optimizer.register_step_post_hook(follow)
    return average


def prepare(run: Run) -> None:
    end = time.monotonic() + options.prepare
    while time.monotonic() < end:
        run.check_stop()
        time.sleep(0.05)


class Faults:
    """What goes wrong, and when: at how many steps done, or (`KIND:POINT@N`) in its N-th save or read-back."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.left = [(what, int(step)) for what, _, step in (fault.partition("@") for fault in options.fault)]

    def at(self, count: int, point: str = "") -> None:
        if int(os.environ.get("RANK", "0")) != options.fault_rank:
            return
        for what, when in list(self.left):
            if when == count and what.partition(":")[2] == point:
                self.left.remove((what, when))
                self.strike(what.partition(":")[0])

    def strike(self, kind: str) -> None:
        run = self.run
        if kind in ("freeze", "die"):
            print(f"struck at {time.time():.3f}", flush=True)
        if kind in ("sigterm", "sigint"):
            os.kill(os.getppid(), getattr(signal, kind.upper()))
            # So short are the steps here that the word could come after the last.
            run.notices.received.wait(10)
        elif kind == "sigterm-here":  # To this rank alone, which goes on half a second later.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        elif kind == "sigterm-tree":
            terminate_tree()
            run.notices.received.wait(10)
        elif kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            request = run.paths.stop(os.environ["SKYSPOT_LAUNCH"])
            request.parent.mkdir(exist_ok=True)
            request.touch()
            await_stop(run)
        elif kind == "await-newer":
            await_stop(run)  # Another attempt has begun, and the journal has seen it.
        elif kind == "await-trackers":  # They have what was logged so far, and have put it into the bucket.
            while not all(one.is_idle for one in run.tracking._reporters):
                time.sleep(0.01)
        elif kind == "limit":
            reach_limit(run)
        elif kind == "outnumber":
            (run.paths.attempts / "a0099-ffffff").mkdir()
        elif kind == "raise":
            raise ValueError("a bug of the program's own")
        elif kind in ("kill", "save"):
            self.take_machine()
        else:
            raise SystemExit(f"--fault {kind}: no such fault")

    def take_machine(self) -> None:
        """End everything at once, as a reclaimed machine does: the launcher dies, and its ranks with it."""
        if options.commit_first:
            end = time.monotonic() + 60
            while begun and not any(map(is_committed, self.run.paths.checkpoints.glob(f"{begun[-1]:010d}-*"))):
                assert time.monotonic() < end
                time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def terminate_tree() -> None:
    """Send SIGTERM to the shell in front of the launcher, and to all processes beneath it, as SkyPilot does."""
    shell = psutil.Process(os.getppid()).parent()
    assert shell is not None
    assert shell.name() == "bash"
    for process in [shell, *shell.children(recursive=True)]:
        process.terminate()


def await_stop(run: Run) -> None:
    while not run.journal.stop_reason:
        time.sleep(0.01)


def is_committed(folder: Path) -> bool:
    with suppress(LayoutError, OSError):  # It is there before it is written.
        return bool(read_manifest(folder).files)
    return False


def watch_saves(run: Run) -> None:
    """Count the saves, and strike in them."""
    start_save, check_save, wait_save = saving.Saver.start, saving.Saver.check, saving.Saver.wait
    copy_run = staging.Copy.run
    folders = itertools.count(1)
    save = [0]

    def start(self, collect) -> None:
        def counted():
            boundary = collect()
            begun.append(boundary.step)
            return boundary

        if not begun:  # Later copies let no forward pass begin.
            forward.clear()
        start_save(self, counted)

    def check(self) -> None:
        while options.late_check and run.rank == 0 and not self.idle:
            time.sleep(0.01)
        check_save(self)

    def wait(self, seconds: float | None = None) -> None:
        if not self.idle:
            awaited.set()
        wait_save(self, seconds)

    def at_point(point: str) -> None:
        if point == "folder-made":
            save[0] = next(folders)
            time.sleep(options.slow_save)
            if options.outlast and save[0] == 1 and awaited.wait(60):
                time.sleep(options.outlast)
        run.faults.at(save[0], point)

    def run_later(copy) -> None:
        forward.wait(60)
        copy_run(copy)

    saving.Saver.start, saving.Saver.check, saving.Saver.wait = start, check, wait
    writing.at_point = at_point
    if options.hold_copy:
        staging.Copy.run = run_later


def watch_reads(run: Run) -> None:
    """Strike in read-backs, and refuse what is read."""
    problem, reads = pruning.problem, itertools.count(1)

    def read_back(folder, manifest, past_cache):
        number = next(reads)
        run.faults.at(number, "read-back")
        if number == options.late_read_back:
            while not run.final_is_whole:
                time.sleep(0.01)
            time.sleep(2)  # Nothing else is left to be done.
        if options.hang_in_read_back:
            threading.Event().wait()
        return problem(folder, manifest, past_cache)

    pruning.problem = read_back
    if not options.unreadable:
        return
    number, times, *step = options.unreadable.split(":")
    failures = [OSError(int(number), os.strerror(int(number)))] * int(times)
    of = f"{int(step[0]):010d}-" if step else ""
    real_open = Path.open

    def open_(path, mode="r", *args, **more):
        if "r" in mode and path.name.startswith("share-") and path.parent.name.startswith(of) and failures:
            raise failures.pop()
        return real_open(path, mode, *args, **more)

    Path.open = open_


def watch_export(run: Run) -> None:
    """Refuse what is exported."""
    if not options.unexportable:
        return
    number, times = map(int, options.unexportable.split(":"))
    refusals = [OSError(number, os.strerror(number))] * times
    real_write = export.write_tensors

    def write(target, tensors, metadata=None):
        run.faults.at(run.steps_done, "export")
        if refusals:
            raise refusals.pop()
        return real_write(target, tensors, metadata)

    export.write_tensors = write


def take_rule_away(run: Run) -> None:
    """Each of these takes away one of the rules that make a resume exact; `lr` is `local_lr`."""
    if options.without == "throw-away":
        computation.Computation.throw_away_pass = lambda self, samples: None
    if options.without == "rng":
        rng.seeded = lambda seed: nullcontext()
    if options.without == "order":
        calls = {"first": None}
        real = samples.step_ids

        def from_the_front(seed, n_samples, global_batch_size, step, offset=0):
            if run.steps_done and calls["first"] is None:
                calls["first"] = run.steps_done
            return real(seed, n_samples, global_batch_size, step - (calls["first"] or 0), offset)

        samples.step_ids = from_the_front


def local_lr(steps: int):
    """A learning rate that counts the calls of this process."""
    local = itertools.count(1)
    return lambda step: 1.0 - next(local) / (steps + 1)


def main() -> None:
    rendezvous.BIND_PATIENCE_S = options.bind_patience
    for constant in options.constant:
        name, _, value = constant.partition("=")
        module, _, name = name.rpartition(".")
        module = import_module(f"trainer.{module}")
        setattr(module, name, type(getattr(module, name))(float(value)))
    real_config, real_model, real_samples = mlp.RunConfig, mlp.make_model, mlp.Samples
    mlp.RunConfig = lambda **fields: real_config(**{**fields, "peer_timeout_s": 60.0, **options.config})
    mlp.make_model = lambda: Net(real_model(options.hidden))
    mlp.Samples = lambda: real_samples(options.samples)
    mlp.SpotRun = Run
    sys.argv[1:] = rest
    mlp.main()


if __name__ == "__main__":
    main()
