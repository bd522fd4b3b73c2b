"""What `SpotRun.train` takes and refuses, how a program ends it early, and what runs after it."""

from __future__ import annotations

import re
import time
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PROGRAMS, Ended, clean_env, column, event, launch, losses, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import RunConfig
from trainer.errors import RunError
from trainer.launch.rank import is_zombie
from trainer.training.arguments import agreed_steps, check_extra, check_model, check_samples
from trainer.training.config import ConfigError
from trainer.training.samples import to_device

MODEL = nn.Linear(2, 1)
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)
DATA = TensorDataset(torch.zeros(4, 2))


class Empty:
    def __len__(self) -> int:
        return 0

    def batch(self, ids: Any) -> Any:
        raise AssertionError

    weight = batch


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_model([MODEL, MODEL], SGD), r"train\(model=...\) is a list; it takes one Module. Several"),
        (lambda: check_model(MODEL, [SGD]), r"train\(optimizer=...\) is a list; it takes one Optimizer"),
        (
            lambda: check_model(MODEL, torch.optim.LBFGS(MODEL.parameters())),
            "a LBFGS evaluates the loss several times a step, and train.. once. Use it in a loop of your own",
        ),
        (lambda: check_samples("samples", DATA), "a TensorDataset has no batch and no weight. Give it"),
        (
            lambda: check_samples("samples", DataLoader(DATA)),
            r"a DataLoader has no batch.*loop of your own: run.register",
        ),
        (lambda: check_samples("held_out", Empty()), r"train\(held_out=...\): the data set is empty"),
        (
            lambda: check_extra({"best": 3}, SGD, False),
            "'best': ...}.: int has no state_dict and load_state_dict. Give it",
        ),
        (
            lambda: check_extra({"plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(SGD)}, SGD, True),
            "both this ReduceLROnPlateau and lr_factor set the learning rate",
        ),
        (lambda: agreed_steps(20, 10), r"RunConfig\(max_steps=20\) and train\(max_steps=10\) differ"),
        (lambda: agreed_steps(None, 0), r"train\(max_steps=0\): give a number of steps"),
        (lambda: agreed_steps(None, None), "max_steps is missing"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_in_a_line(check: Any, message: str) -> None:
    with pytest.raises(RunError, match=message) as refused:
        check()
    assert "\n" not in str(refused.value)


def test_what_agrees_is_taken() -> None:
    torch.optim.lr_scheduler.StepLR(SGD, 1)  # It wraps the optimizer's step.
    check_model(MODEL, SGD)
    assert (agreed_steps(20, 20), agreed_steps(None, 7), agreed_steps(9, None)) == (20, 7, 9)
    check_extra({"plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(SGD)}, SGD, False)


def test_a_folder_may_be_text() -> None:
    assert RunConfig(checkpoint_dir="runs/first").checkpoint_dir == Path("runs/first")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--checkpoint-dir: 3 is not a folder"):
        RunConfig(checkpoint_dir=3)  # type: ignore[arg-type]


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    name: str


def test_a_batch_keeps_its_types_and_attributes_on_its_way_to_a_device() -> None:
    from transformers import BatchEncoding

    zeros, meta = torch.zeros(2), torch.device("meta")
    batch = OrderedDict(
        encoding=BatchEncoding({"input_ids": zeros}),
        record=Record(zeros, "a"),
        pairs=[Pair(zeros, {"deep": (zeros, 3)})],
    )
    moved = to_device(batch, meta)
    assert type(moved) is OrderedDict
    assert type(moved["encoding"]) is BatchEncoding
    assert moved["encoding"].input_ids.device == meta
    assert moved["record"].x.device == meta
    assert moved["record"].name == "a"
    pair = moved["pairs"][0]
    assert type(pair) is Pair
    assert (pair.x.device, pair.y["deep"][0].device, pair.y["deep"][1]) == (meta, meta, 3)
    assert batch["record"].x.device == torch.device("cpu")


def early(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    # Cold (a fork does not follow this variable): how an interpreter ends is what is tested.
    env = clean_env(PYTHONHASHSEED="0")
    return launch(PROGRAMS / "early.py", "--dir", run_dir, *args, processes=processes, env=env)


def assert_pools_end(ended: Ended, processes: int) -> None:
    """The process pools, one for each process, end."""
    pools = re.findall(r"pool (\d+)\.", ended.output)
    assert len(pools) == processes
    end = time.monotonic() + 60
    while not all(is_zombie(int(pid)) or not Path(f"/proc/{pid}").exists() for pid in pools):
        assert time.monotonic() < end, pools
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_training_that_the_program_ends_is_finished_at_that_step(tmp_path: Path, processes: int) -> None:
    run_dir = tmp_path / "run"
    args = ("--enough-at", 7, "--ender", processes - 1)
    stopped = early(run_dir, *args, "--strike", "5:SIGTERM", processes=processes)
    assert stopped.code == 75, stopped.output
    assert "uploaded" not in stopped.output
    assert stopped.output.count("at exit") == processes
    assert stopped.output.count("train() does not step this") == 1
    assert "train(extra={'plateau': ...}): train() does not step this ReduceLROnPlateau" in stopped.output
    # Its log is flushed, and its process pool is gone.
    done_then = event(run_dir, "end")["step"]
    assert (tmp_path / "run-log-0").read_text().split() == [str(step + 1) for step in range(int(str(done_then)))]
    assert_pools_end(stopped, processes)
    killed = early(run_dir, *args, "--dies-after", processes=processes)
    assert killed.code == 75, killed.output
    assert_pools_end(killed, processes)
    done = early(run_dir, *args, processes=processes)
    assert done.code == 0, done.output
    assert done.output.count("already finished") == 1
    assert done.output.count("uploaded at") == done.output.count("after the block") == processes
    assert done.output.count("at exit") == processes
    assert event(run_dir, "end")["cause"] == "already-finished"
    assert sorted(losses(run_dir)) == list(range(1, 8))
    assert column(run_dir, "lr") == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125]
    more = launch(PROGRAMS / "early.py", "--dir", run_dir, "--until", 9, "--enough-at", 0, processes=processes)
    assert "config mismatch" in more.output
    assert weights(run_dir)


@pytest.mark.slow
def test_a_second_call_of_train_is_refused(tmp_path: Path) -> None:
    done = early(tmp_path / "run", "--until", 3, "--twice")
    assert done.code == 1
    assert "Error: train() was called before, and this run is finished. Give a second phase" in done.output
    assert "Traceback" not in done.output
