"""A small training that waits in one phase until its stop is heard there; tests/chaos/stops.py starts it.

python -m trainer.launch --processes 2 tests/programs/stopped.py --dir RUN --control FOLDER --phase import --at-rank 1

It prints `@reached` in the phase, and `@heard` once this rank has heard of the stop. In the folder --control it leaves
the process ids of its ranks; the number of each optimizer step, as AdamW itself counts them, and those of the steps
after the stop was heard; where each rank stopped, and by which deadline; whether it held until a signal came; and
whether its training thread asked a metadata service.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "chaos"))

import stop_plants


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--phase", required=True)
    parser.add_argument("--at-rank", type=int, default=0)
    parser.add_argument("--cloud", action="store_true", help="the first word comes from a metadata service")
    parser.add_argument("--slow-save", type=float, default=0.0, help="seconds more for each save")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--save-every", type=int, default=100_000)
    parser.add_argument("--point", default="", help="the point of a save under way")
    parser.add_argument("--hub", default="", help="the URL to download from")
    parser.add_argument("--plant", default="", help="a mistake of tests/chaos/stop_plants.py")
    return parser.parse_args()


options = parse()
LIMIT_S, PEER_TIMEOUT_S = (stop_plants.LIMIT_S, stop_plants.PEER_TIMEOUT_S) if options.plant else (300.0, 60.0)
rank = int(os.environ.get("RANK", "0"))
for name, pid in ((f"rank-{rank}", os.getpid()), ("launcher", os.getppid())):
    whole = options.control / f"{name}-{rank}.new"  # Every rank writes it, and a part of a number is another process.
    whole.write_text(str(pid))
    whole.replace(options.control / name)


class Phase:
    """The phase in which the stop comes."""

    def __init__(self) -> None:
        self.run = None
        self.was_reached = False

    def reach(self, name: str) -> None:
        """Wait here for the stop, if this is the phase."""
        if name != options.phase or rank != options.at_rank or self.was_reached:
            return
        self.was_reached = True
        print("@reached", flush=True)
        if self.run is None and not options.cloud:
            threading.Event().wait(LIMIT_S)  # No handler is there yet: the signal ends this process.
        elif self.run is None:
            while not (options.control / "announced").exists():
                time.sleep(0.01)
        elif not self.run.notices.received.wait(LIMIT_S):
            raise SystemExit("the stop was not heard")
        print("@heard", flush=True)


phase = Phase()
phase.reach("import")

import mlp  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from trainer import RunConfig, SpotRun  # noqa: E402
from trainer.checkpoint import pruning, writing  # noqa: E402
from trainer.finetune import hub  # noqa: E402
from trainer.notices import service  # noqa: E402
from trainer.ranks import rendezvous  # noqa: E402
from trainer.training import closing, export, participant  # noqa: E402


class Samples(mlp.Samples):
    def batch(self, ids):
        phase.reach("first batch")
        return super().batch(ids)


def note(name: str, *values: object) -> None:
    with (options.control / name).open("a") as file:
        print(*values, file=file)


class Steps:
    """The optimizer steps of this attempt."""

    def __init__(self) -> None:
        self.done = self.micro_steps = 0
        """Steps of this attempt; micro-steps of the step under way."""

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        first = next(model.parameters())

        def stepped(*_: object) -> None:
            self.done, self.micro_steps = self.done + 1, 0
            if rank == 0:
                note("steps", int(optimizer.state[first]["step"]))
                if phase.run.notices.received.is_set():
                    note("more-steps", int(optimizer.state[first]["step"]))
            if self.done >= 2:
                phase.reach("the optimizer's step")  # Done, and not counted yet.

        optimizer.register_step_post_hook(stepped)


steps = Steps()


def compiles(graph: torch.fx.GraphModule, _inputs: object):
    phase.reach("torch.compile")
    return graph.forward


compiled_loss = torch.compile(mlp.loss, backend=compiles)


def loss(model: nn.Module, batch: object) -> torch.Tensor:
    if not model.training:
        if steps.done:
            phase.reach("evaluation")
        return mlp.loss(model, batch)
    if steps.done >= 2:
        phase.reach("an ordinary step")
        if steps.micro_steps == 1:
            phase.reach("accumulation")
        steps.micro_steps += 1
        if options.phase == "torch.compile":
            return compiled_loss(model, batch)
    return mlp.loss(model, batch)


def watch_phases() -> None:
    """Have the trainer's own work pass through `phase`."""
    open_, problem, write = rendezvous.Rendezvous.open, pruning.problem, export.write_tensors

    def open_store(self, check_stop):
        phase.reach("rendezvous")
        return open_(self, check_stop)

    def at_point(point: str) -> None:
        if point == options.point:
            phase.reach("a save under way")
        if point == "folder-made":
            time.sleep(options.slow_save)

    def read_back(*given):
        phase.reach("pruning")
        return problem(*given)

    def export_tensors(*given):
        phase.reach("the final export")
        return write(*given)

    rendezvous.Rendezvous.open, writing.at_point = open_store, at_point
    pruning.problem, export.write_tensors = read_back, export_tensors


def watch_stop() -> None:
    """Note where this rank stops, and what its training thread does."""
    ask, stop_at, hold = service.Service.ask, closing.Closing.stop, participant.Participant.hold

    def asked(self, *given, **named):
        if threading.current_thread() is threading.main_thread():
            note("asked-in-training", *given)
        return ask(self, *given, **named)

    def stopped(self, stop):
        note(f"stopped-{rank}", phase.run.steps_done, phase.run.deadline(stop))
        return stop_at(self, stop)

    def held(self, *given, **named):
        hold(self, *given, **named)
        if rank == 0 and self.notices.signalled.is_set():
            note("held")

    service.Service.ask, closing.Closing.stop, participant.Participant.hold = asked, stopped, held


def download(run: SpotRun) -> str:
    from huggingface_hub import constants

    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
        constants.ENDPOINT, options.hub
    )
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = options.hub, False
    constants.HF_HUB_CACHE = str(options.control / "hub")
    model = hub.Repository("org/net", "model", None)
    return str(hub.download(model, choose=lambda names: names, check_stop=run.check_stop))


def prepare(run: SpotRun) -> None:
    phase.reach("data preparation")
    run.check_stop()


def main() -> None:
    watch_phases()
    watch_stop()
    if options.plant:
        stop_plants.PLANTS[options.plant].make(options)
    config = RunConfig(checkpoint_dir=options.dir, max_steps=options.steps, save_interval_steps=options.save_every,
                       global_batch_size=24, micro_batch_size=2, seed=7, eval_interval_steps=3, keep_latest=2,
                       peer_timeout_s=PEER_TIMEOUT_S, cpu=True, allow_config_change=("max_steps",))  # fmt: skip
    phase.run = SpotRun(config)
    with phase.run as run:
        if options.phase == "model download":
            run.rank0_does("download", lambda: download(run))
        if options.phase == "data preparation":
            run.rank0_does("prepare", lambda: prepare(run))
        torch.manual_seed(config.seed)
        model = mlp.make_model(8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        steps.watch(model, optimizer)
        run.train(model, optimizer, samples=Samples(48), loss=loss, held_out=mlp.Samples(16))


if __name__ == "__main__":
    main()
