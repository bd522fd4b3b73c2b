"""Loops of the user's own: register, steps and finish, struck at any step, end with the same bits."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import shared
import torch
from support import PROGRAMS, Ended, assert_resumed, event, history, launch, losses, noticed, weights

from trainer.training import same_batches

SCRIPT = PROGRAMS / "own_loop.py"
STRIKES = [("7:SIGKILL", "8:SIGTERM", "16:SIGKILL"), ("5:SIGTERM", "6:SIGTERM", "15:SIGTERM")]
SLOW = ["plain", "generator", "weighted", "stream", "workers"]
ORDERS = ["shuffle", "noise", *(pytest.param(order, marks=pytest.mark.slow) for order in SLOW)]


def own(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    return launch(SCRIPT, "--dir", run_dir, *args, processes=processes)


def exported(run_dir: Path) -> tuple[dict[str, bytes], str]:
    return weights(run_dir), (run_dir / "final" / "values.json").read_text()


def undisturbed(factory: pytest.TempPathFactory, *args: object, processes: int = 1) -> Path:
    """The run that nothing strikes; the same for all tests."""

    def build(empty: Path) -> None:
        done = own(empty / "run", *args, processes=processes)
        assert done.code == 0, done.output

    name = re.sub(r"\W+", "-", " ".join(map(str, args)))
    return shared.built_once(factory, f"own-loop-{processes}{name}", build) / "run"


def struck(run_dir: Path, *args: object, processes: int = 1, strikes: tuple[str, ...]) -> Ended:
    """One attempt for each strike, and one to the end."""
    for strike in strikes:
        ended = own(run_dir, *args, "--strike", strike, processes=processes)
        assert ended.code == 75, ended.output
    done = own(run_dir, *args, processes=processes)
    assert done.code == 0, done.output
    assert_resumed(run_dir)
    return done


# 18 items in batches of 4: 5 batches an epoch, a save every 3 steps.
@pytest.mark.parametrize(
    "strikes", [("7:SIGKILL", "8:SIGTERM", "16:SIGKILL"), ("5:SIGTERM", "6:SIGTERM", "15:SIGTERM")]
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_loop_of_ones_own_ends_with_the_same_bits_however_often_it_is_struck(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, order: str, strikes: tuple[str, ...]
) -> None:
    whole = undisturbed(tmp_path_factory, "--order", order)
    done = struck(tmp_path / "run", "--order", order, strikes=strikes)
    assert "after the block: step 20" in done.output
    assert losses(tmp_path / "run") == losses(whole)
    assert sorted(losses(whole)) == list(range(1, 21))
    assert exported(tmp_path / "run") == exported(whole)


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_accumulation_that_does_not_divide_an_epoch_resumes_exactly(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, accumulate: int
) -> None:
    args = ("--accumulate", accumulate, "--until", 9)
    whole = undisturbed(tmp_path_factory, *args)
    struck(tmp_path / "run", *args, strikes=("4:SIGTERM", "7:SIGKILL"))
    assert losses(tmp_path / "run") == losses(whole)
    assert exported(tmp_path / "run") == exported(whole)


@pytest.mark.slow
def test_two_ranks_drop_the_micro_steps_of_one_step_and_resume_exactly(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Only the first rank hears of the stop, in the first micro-step of step 6; a save came after step 3."""
    args = ("--order", "distributed", "--count", 40, "--accumulate", 3, "--until", 7)
    whole = undisturbed(tmp_path_factory, *args, processes=2)
    stopped = own(tmp_path / "run", *args, "--strike", "6:SIGTERM", "--no-time", processes=2)
    assert stopped.code == 75, stopped.output
    assert "dropping the micro-steps of step 6" in stopped.output
    assert event(tmp_path / "run", "end")["committed_step"] == 5
    done = own(tmp_path / "run", *args, processes=2)
    assert done.code == 0, done.output
    assert_resumed(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    assert exported(tmp_path / "run") == exported(whole)


@pytest.mark.parametrize("order", ["distributed", pytest.param("unequal", marks=pytest.mark.slow)])
def test_two_ranks_end_with_the_same_bits(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, order: str) -> None:
    args = ("--order", order, "--count", 40)
    whole = undisturbed(tmp_path_factory, *args, processes=2)
    done = struck(tmp_path / "run", *args, processes=2, strikes=("7:SIGKILL", "8:SIGTERM"))
    assert "the same batch" not in done.output
    assert losses(tmp_path / "run") == losses(whole)
    assert exported(tmp_path / "run") == exported(whole)


@pytest.mark.parametrize(
    ("hashes", "same"), [([7, 7], True), ([7, 8], False), ([0, 0], False), ([7, 7, 8], False), ([7], False)]
)
def test_ranks_that_train_on_one_batch_are_found(hashes: list[int], same: bool) -> None:
    exchange = types.SimpleNamespace(wait=lambda: [[one] for one in hashes])
    group = types.SimpleNamespace(world_size=len(hashes), exchange=lambda mine: exchange)
    assert same_batches.are_same(group, hashes[0]) is same  # type: ignore[arg-type]


def test_a_hash_of_a_batch_is_that_of_its_dense_tensors() -> None:
    one = torch.arange(6.0)
    assert same_batches.hash_of({"x": [one]}) == same_batches.hash_of((one.clone(),)) != 0
    assert same_batches.hash_of({"x": one}) != same_batches.hash_of({"x": one + 1})
    assert same_batches.hash_of({"x": one.to_sparse(), "y": "text"}) == same_batches.hash_of([]) == 0
    assert same_batches.hash_of(torch.tensor([1j]).conj())
    assert same_batches.hash_of(torch.tensor(True))


@pytest.mark.slow
def test_another_number_of_processes_continues_after_as_many_samples_and_says_so(tmp_path: Path) -> None:
    args = ("--order", "generator", "--count", 40)
    stopped = own(tmp_path / "run", *args, "--strike", "4:SIGTERM", processes=2)
    assert stopped.code == 75, stopped.output
    assert same_batches.line(2) in stopped.output, "both have one generator"
    done = own(tmp_path / "run", *args)
    assert done.code == 0, done.output
    assert "the same batch" not in done.output
    assert "2 processes consumed 32 samples of epoch 0; 1 continue after 8 batches each." in done.output
    assert sorted(losses(tmp_path / "run")) == list(range(1, 21))


@pytest.mark.parametrize(
    ("how", "step"), [(["--apart"], 1), pytest.param(["--apart-at", 4], 6, marks=pytest.mark.slow)]
)
def test_parameters_that_each_rank_trains_for_itself_are_refused(tmp_path: Path, how: list[object], step: int) -> None:
    ended = own(tmp_path / "run", "--order", "distributed", "--count", 40, *how, processes=2)
    assert ended.code == 1
    assert f"Error: the ranks have different parameters of 'critic' after step {step}: each trains" in ended.output
    assert "Traceback" not in ended.output


def test_skipped_samples_are_not_loaded(tmp_path: Path) -> None:
    assert own(tmp_path / "run", "--count", 400, "--strike", "40:SIGTERM", "--until", 45).code == 75
    assert event(tmp_path / "run", "end")["committed_step"] == 40
    done = own(tmp_path / "run", "--count", 400, "--until", 45)
    assert "after the block: step 45, 20 items" in done.output, done.output


def test_a_notice_loses_no_step(tmp_path: Path) -> None:
    assert noticed(SCRIPT, "--dir", tmp_path / "run", "--strike", "8:notice").code == 75
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["committed_step"]) == ("notice", 8)
    own(tmp_path / "run")
    assert event(tmp_path / "run", "restored")["step"] == 8


def test_a_finished_run_trains_no_more_and_the_code_after_it_runs_again(tmp_path: Path) -> None:
    assert own(tmp_path / "run").code == 0
    again = own(tmp_path / "run")
    assert again.code == 0
    assert "already finished" in again.output
    assert "after the block: step 20, 0 items" in again.output
    more = own(tmp_path / "run", "--until", 24)
    assert more.code == 0, more.output
    assert "after the block: step 24" in more.output
    assert sorted(losses(tmp_path / "run")) == list(range(1, 25))


def test_a_loop_that_is_left_early_is_finished_there(tmp_path: Path) -> None:
    done = own(tmp_path / "run", "--enough-at", 8)
    assert done.code == 0, done.output
    assert "after the block: step 8" in done.output
    again = own(tmp_path / "run", "--enough-at", 8)
    assert "after the block: step 8, 0 items" in again.output, again.output


def test_what_no_state_dict_holds_is_named(tmp_path: Path) -> None:
    done = own(tmp_path / "run", "--forgets")
    assert done.code == 0, done.output
    assert done.output.count("ema.counts changes during training, and its object's state_dict() does not hold it") == 1
    assert "changes during training" not in own(tmp_path / "other").output


LOOP = """
from trainer import SpotRun
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

model, data = nn.Linear(2, 1), TensorDataset(torch.randn(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
class Mute:
    def state_dict(self): return {{"f": print}}
    def load_state_dict(self, saved): pass
loader, more = DataLoader(data, batch_size=2), {more}
with SpotRun({run}) as run:
    run.register(model=model, optimizer=optimizer, **more)
    for (x,) in run.steps(loader, until=6):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        {body}
    {end}
print("after the block")
"""


def loop(tmp_path: Path, body: str = "pass", end: str = "run.finish()", more: str = "{}", run: str = "") -> Ended:
    script = tmp_path / "script.py"
    script.write_text(LOOP.format(body=body, end=end, more=more, run=run or repr(str(tmp_path / "run"))))
    return launch(script)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run": "3"}, "SpotRun(3): give the run's folder, or a RunConfig"),
        ({"run": "'/tmp/x', save_every=0"}, 'SpotRun(save_every=0): give a number of steps, or "auto"'),
        ({"run": "'/tmp/x', keep=1"}, "SpotRun(keep=1): keep at least 2 checkpoints"),
        ({"more": "dict(best=3)"}, "register(best=...): int has no state_dict and load_state_dict. Put it into"),
        ({"body": "run.state['it'] = {'f': print}"}, "run.state.it.f: a builtin_function_or_method cannot be saved"),
        ({"more": "dict(m=Mute())"}, "m.f: a builtin_function_or_method cannot be saved; use tensors, arrays, numbers"),
        ({"more": "dict(f=print)"}, "register(f=...): builtin_function_or_method has no state_dict and load_state"),
        ({"body": "break", "end": "pass"}, "the `with SpotRun(...)` block ended before the training was done"),
        ({"body": "sys.exit(0)"}, "the script called sys.exit(0) before the training was done"),
        ({"body": "model.weight.data.fill_(float('nan'))"}, "step 2: model.model.weight is not finite"),
        ({"body": "run.log(note='x' * 9, acc=[1])"}, "run.log: [1] is neither a number nor text"),
        ({"body": "run.register(more=optimizer)"}, "register() must be called before the first step"),
        ({"body": "run.register(model)"}, "register(): give each object a name, as in run.register(model=model)"),
        ({"body": "run.log(loss='0.5')"}, "run.log(loss='0.5'): the loss is a number. Log text under another name"),
        ({"end": "run.finish('model.pt')"}, "finish('model.pt'): give a function that writes into a folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_mistake_is_said_in_a_line(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    if "nan" in changed.get("body", ""):
        changed = {**changed, "run": f"{str(tmp_path / 'run')!r}, save_every=2"}
    ended = loop(tmp_path, **changed)
    assert ended.code == 1
    assert f"Error: {message}" in ended.output
    assert "Traceback" not in ended.output
    assert "Warning" not in ended.output
    assert "after the block" not in ended.output


def test_a_step_that_is_logged_does_not_replace_the_runs_own(tmp_path: Path) -> None:
    assert loop(tmp_path, body="run.log(step=7000, epoch_loss=1.5)").code == 0
    lines = history(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["epoch_loss"] for line in lines} == {1.5}


def test_other_names_than_those_in_the_checkpoint_are_refused(tmp_path: Path) -> None:
    assert loop(tmp_path).code == 0
    more = loop(tmp_path, more="dict(other=nn.Linear(1, 1))")
    assert more.code == 1
    assert "Error: 'other' is registered, but checkpoint" in more.output
    assert "It has model, optimizer. Remove it, or start a new run" in more.output
