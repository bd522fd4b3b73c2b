"""Hugging Face's Trainer with SpotCallback: struck at any place, it ends with the same losses and weights."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
import shared
import torch
from curves import recorded, scalars, shown
from in_process import Attempts, Script
from support import (
    PROGRAMS,
    REPO,
    Ended,
    assert_resumed,
    clean_env,
    column,
    event,
    history,
    launch,
    limit_variables,
    losses,
    noticed,
    weights,
)

from trainer import SpotRun, check
from trainer.layout.names import RunPaths, list_checkpoints
from trainer.training import journal
from trainer.training.cut_models import unsupported_cut
from trainer.training.trainer_batch import batch_remedy

SCRIPT = PROGRAMS / "hf.py"
SHARDED = '{"state_dict_type": "SHARDED_STATE_DICT"}'


def test_each_batch_that_is_trained_on_is_given_to_the_rehearsal() -> None:
    from trainer.training.drawn_ahead import DrawnAhead

    given: list[object] = []
    trainer = types.SimpleNamespace(get_batch_samples=lambda batches, count: ([next(batches) for _ in range(count)], 5))
    DrawnAhead(trainer, None, None, given.append)
    assert trainer.get_batch_samples(iter("abc"), 2) == (["a", "b"], 5)
    assert given == ["a", "b"]


class Trained(torch.nn.Module):
    """Predicts a point from a point; its loss has dropout's noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.noise = torch.nn.Linear(2, 1), torch.nn.Dropout(0.3)

    def forward(self, x, labels):
        made = self.net(self.noise(x))
        return {"loss": (made - labels).square().mean(), "logits": made}


ITEMS = [{"x": torch.tensor([k / 7, 1 - k / 5]), "labels": torch.tensor([k / 3])} for k in range(8)]


@pytest.mark.parametrize(("strategy", "lines"), [("steps", 1), ("no", 0)])
def test_a_save_strategy_is_set_aside_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str, lines: int
) -> None:
    import transformers

    from trainer.hf import SpotCallback

    def train(run: SpotRun, _: object) -> None:
        args = transformers.TrainingArguments(
            str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, save_strategy=strategy, save_steps=1,
            save_total_limit=1, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = transformers.Trainer(Trained(), args, train_dataset=ITEMS, callbacks=[SpotCallback(run)])
        trainer.train(resume_from_checkpoint=run.resume_from())
        run.finish()

    runs = Attempts(tmp_path / "run")
    assert runs.one(train, save_every=2) == 0
    said = capsys.readouterr().out.count("are set aside: SpotRun's save_every and keep decide")
    assert said == lines
    assert [name.step for name in list_checkpoints(RunPaths(runs.folder))] == [4, 2]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_argument_that_contradicts_the_callback_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from trainer.hf import _REFUSED, SpotCallback

    def make(run: SpotRun, name: str) -> None:
        args = transformers.TrainingArguments(
            str(tmp_path / "out"), report_to=[], use_cpu=True, eval_strategy="steps", **{name: True}
        )
        transformers.Trainer(Trained(), args, train_dataset=ITEMS, eval_dataset=ITEMS, callbacks=[SpotCallback(run)])

    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    page, before = (REPO / "docs" / "your-own-script.md").read_text(), signal.getsignal(signal.SIGTERM)
    for name in _REFUSED:
        assert f"`{name}`" in page
        if name not in known:  # The oldest supported transformers.
            continue
        try:
            assert Attempts(tmp_path / name).one(lambda run, _, name=name: make(run, name)) == 1
        finally:
            signal.signal(signal.SIGTERM, before)  # That of enable_jit_checkpoint stays otherwise.
        errors = capsys.readouterr().err
        assert f"Error: TrainingArguments({name}=True) does not work with SpotCallback: {_REFUSED[name]}\n" in errors
        assert "Traceback" not in errors


@pytest.mark.slow  # Nine trainings, though tiny ones; the one below sees what is put back.
def test_a_stop_within_any_evaluation_or_prediction_loses_nothing(tmp_path: Path) -> None:
    """In the Trainer's own evaluation, with other weights or not; in a callback's; before and after the training."""
    import transformers

    from trainer.hf import SpotCallback

    items, predicted = ITEMS, list[str]()

    class Swapping(transformers.Trainer):
        def evaluate(self, *args, **options):
            weight = self.model.net.weight.data
            kept = weight.clone()
            weight.mul_(0.5)
            try:
                return super().evaluate(*args, **options)
            finally:
                weight.copy_(kept)

    def train(run: SpotRun, struck: str, kind: type = transformers.Trainer) -> None:
        phase = "before"

        class Watch(transformers.TrainerCallback):
            def on_prediction_step(self, args, state, control, **_):
                predicted.append(f"{phase} {state.global_step}")
                if predicted.count(predicted[-1]) == 1 and predicted[-1] == struck:
                    os.kill(os.getpid(), signal.SIGTERM)

            def on_step_end(self, args, state, control, **_):
                nonlocal phase
                if state.global_step == 3:
                    phase = "callback"
                    trainer.predict(items[:4])
                    phase = "own"

        args = transformers.TrainingArguments(
            str(tmp_path / "out"), num_train_epochs=1, per_device_train_batch_size=2, per_device_eval_batch_size=2,
            eval_strategy="steps", eval_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1,
        )  # fmt: skip
        callbacks = [Watch(), SpotCallback(run)]
        trainer = kind(Trained(), args, train_dataset=items, eval_dataset=items, callbacks=callbacks)
        trainer.predict(items[:4])
        phase = "own"
        trainer.train(resume_from_checkpoint=run.resume_from())
        phase = "after"
        trainer.predict(items[:4])
        run.finish()

    def attempts(name: str, *strikes: str, kind: type = transformers.Trainer) -> tuple[object, list[list[str]]]:
        runs, seen = Attempts(tmp_path / name), []
        for struck in strikes:
            code = runs.one(lambda run, _, at=struck: train(run, at, kind), save_every=100)
            assert code == (75 if struck else 0)
            seen.append(predicted[:])
            predicted.clear()
        return runs.result, seen

    whole, _ = attempts("whole", "")
    # A prediction of 2 batches, an evaluation of 4.
    found, seen = attempts("struck", "before 0", "own 2", "own 2", "callback 3", "after 4", "")
    assert found == whole
    before = ["before 0"] * 2
    assert seen[0] == before[:1]
    assert seen[1] == seen[2] == [*before, "own 2"]
    # It is a part of the step's end; the ranks had begun to agree before.
    assert seen[3] == [*before, *["own 2"] * 4, *["callback 3"] * 2, "own 4"]
    assert seen[4] == [*before, *["own 4"] * 4, "after 4"]
    found, seen = attempts("swapped", "own 2", "", kind=Swapping)
    assert found == whole
    assert seen[0].count("own 2") == 4, "other weights are not saved in its midst"


def test_an_evaluation_that_is_cut_short_leaves_no_trace() -> None:
    """A first data set's evaluation has been counted when a stop comes within the second's."""
    from transformers import EarlyStoppingCallback, TrainerControl

    from trainer.training.trainer_evaluation import BeforeEvaluation

    patience, control = EarlyStoppingCallback(2), TrainerControl()
    trainer = types.SimpleNamespace(
        state=types.SimpleNamespace(log_history=[{"loss": 1.0}]), control=control, is_fsdp_enabled=False,
        model=torch.nn.Linear(1, 1), callback_handler=types.SimpleNamespace(callbacks=[object(), patience]),
    )  # fmt: skip
    group = types.SimpleNamespace(all_ranks=lambda mine: mine)
    before, drawn = BeforeEvaluation(trainer, group), torch.rand(1)
    patience.early_stopping_patience_counter, control.should_training_stop = 2, True
    trainer.state.log_history += [{"loss": 0.5}, {"eval_a_loss": 1.0}]
    assert before.may_go_back()
    before.go_back()
    assert (patience.early_stopping_patience_counter, control.should_training_stop) == (0, False)
    assert trainer.state.log_history == [{"loss": 1.0}, {"loss": 0.5}]
    assert torch.equal(torch.rand(1), drawn)
    trainer.model.weight.data.add_(1)
    assert not before.may_go_back()


def test_a_batch_that_cannot_make_the_runs_steps_is_refused_with_the_arguments_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from trainer.hf import SpotCallback

    def train(run: SpotRun, batch: int) -> None:
        args = transformers.TrainingArguments(
            str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=batch, report_to=[], use_cpu=True
        )
        transformers.Trainer(torch.nn.Linear(1, 1), args, callbacks=[SpotCallback(run)])
        raise RuntimeError("as planned")

    runs = Attempts(tmp_path / "run")
    assert runs.one(lambda run, _: train(run, 4)) == 1
    capsys.readouterr()
    assert runs.one(lambda run, _: train(run, 3)) == 1
    assert (
        "this run was started with global_batch_size=4, not global_batch_size=3. Use another run name, or set "
        "per_device_train_batch_size=2 (its product with the number of processes must divide 4), or give "
        'SpotRun(allow_config_change=["global_batch_size"])'
    ) in capsys.readouterr().err
    on_three = types.SimpleNamespace(world_size=3, per_device_train_batch_size=3)
    assert "set per_device_train_batch_size=2 (" in batch_remedy(on_three, 24)
    assert "a number of processes that divides 8 (per_device_train_batch_size" in batch_remedy(on_three, 8)


def tiny(output: Path, **arguments: object) -> Script:
    """A program that trains in 12 steps, four an epoch, with an evaluation after each epoch."""
    import transformers

    from trainer.hf import SpotCallback

    items = [{"x": torch.tensor([k / 7, 1 - k / 5]), "labels": torch.tensor([k / 3])} for k in range(8)]

    def train(run: SpotRun, strike: Callable[[], None]) -> None:
        class Striker(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                strike()

        args = transformers.TrainingArguments(
            str(output), max_steps=12, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=4,
            logging_steps=1, disable_tqdm=True, use_cpu=True, **{"report_to": [], **arguments},
        )  # fmt: skip
        callbacks = [SpotCallback(run), Striker()]
        trainer = transformers.Trainer(Trained(), args, train_dataset=items, eval_dataset=items, callbacks=callbacks)
        try:
            trainer.train(resume_from_checkpoint=run.resume_from())
            run.finish()
        finally:
            for one in trainer.callback_handler.callbacks:  # pytest's process goes on, with the thread of its writer.
                if writer := getattr(one, "tb_writer", None):
                    writer.close()

    return train


@pytest.mark.usefixtures("patient")
def test_a_run_that_reports_has_one_curve_and_the_trainers_own_reports_go_on_beside_it(tmp_path: Path) -> None:
    runs, train = Attempts(tmp_path / "run"), tiny(tmp_path / "out", report_to=["tensorboard"])
    for strike, kind, code in ((6, "crash", 1), (7, "stop", 75), (0, "stop", 0)):
        assert runs.one(train, strike, kind, report_to="tensorboard") == code
    curve = shown(runs.folder)
    assert [step for step, _ in curve["loss"]] == list(range(1, 13))
    assert [step for step, _ in curve["eval_loss"]] == [4, 8, 12]
    for name in ("loss", "eval_loss", "lr", "grad_norm", "epoch"):
        assert curve[name] == recorded(runs.folder, name), name
    own = sorted((tmp_path / "out").glob("runs/*/events*"), key=lambda path: path.stat().st_mtime_ns)
    logged = [[step for step, _ in scalars(path)["train/loss"]] for path in own]
    assert logged == [[1, 2, 3, 4, 5], [4, 5, 6, 7], [8, 9, 10, 11, 12]], "nobody rewinds them"


def test_a_run_leaves_with_79_at_a_limit_after_a_save_and_goes_on_exactly_once_it_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LOOK_S", 0.1)
    runs, train = Attempts(tmp_path / "run"), tiny(tmp_path / "out")
    spend, tomorrow = limit_variables(max_spend=900), datetime.fromtimestamp(time.time() + 86400, timezone.utc)
    assert runs.one(train, 5, "limit", spend) == 79
    end = event(runs.folder, "end")
    assert (end["cause"], end["step"], end["committed_step"]) == ("max-spend", 5, 5)
    assert runs.one(train, env=spend) == 79
    assert not event(runs.folder, "restored"), "it is not started"
    assert runs.one(train, 8, "limit", limit_variables(deadline=tomorrow.isoformat())) == 79
    end = event(runs.folder, "end")
    assert (end["cause"], end["step"], end["committed_step"]) == ("deadline", 8, 8)
    assert runs.one(train, env=limit_variables(max_spend=1900)) == 0
    assert event(runs.folder, "restored")["step"] == 8
    assert runs.result == Attempts(tmp_path / "whole").all(train).result


def hf(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    return launch(SCRIPT, "--dir", run_dir, *args, processes=processes)


def undisturbed(factory: pytest.TempPathFactory, *args: object, processes: int = 1) -> Path:
    """The run that nothing strikes; the same for all tests."""

    def build(empty: Path) -> None:
        done = hf(empty / "run", *args, processes=processes)
        assert done.code == 0, done.output
        (empty / "output.txt").write_text(done.output)

    name = re.sub(r"\W+", "-", " ".join(map(str, args)))
    return shared.built_once(factory, f"hf-{processes}{name}", build) / "run"


def logged(output: str) -> list[str]:
    """What the Trainer logged over the whole run, and its training loss, as the program prints them."""
    return [line for line in output.splitlines() if line.startswith(("logged ", "after the block"))]


def ends_alike(
    run: Path, factory: pytest.TempPathFactory, *args: object, strikes: list[str], processes: int = 1
) -> None:
    """Strike a run once in each attempt, let it end, and compare it with the undisturbed one."""
    whole = undisturbed(factory, *args, processes=processes)
    for strike in strikes:
        option = "--strike" if ":" in strike else "--strike-in-evaluation"
        start = noticed if strike.endswith("notice") else launch
        ended = start(SCRIPT, "--dir", run, *args, option, strike, processes=processes)
        assert ended.code == 75, ended.output
        assert ("dropping the micro-steps of step" in ended.output) == ("--no-time" in args), ended.output
        if "SIGKILL" not in strike:
            assert event(run, "end")["committed_step"] == event(run, "end")["step"]
    done = hf(run, *args, processes=processes)
    assert done.code == 0, done.output
    assert_resumed(run)
    assert losses(run) == losses(whole)
    assert losses(whole)
    assert weights(run) == weights(whole)
    assert logged(done.output) == logged((whole.parent / "output.txt").read_text())
    for key in ("num_tokens", "entropy"):  # TRL's.
        assert [line.get(key) for line in history(run)] == [line.get(key) for line in history(whole)]


# 13 samples in batches of 2: 7 steps an epoch. The loss is logged every 3 steps, a save is due every 4.
def test_a_run_that_is_struck_ends_with_the_same_bits(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path / "run"
    args = ("--log", 3, "--evaluate", "steps", "--masks")
    ends_alike(run, tmp_path_factory, *args, strikes=["3:SIGKILL", "8:notice", "12"])
    assert len(column(run, "lr")) == 7
    again = hf(run, *args)
    assert again.code == 0, again.output
    assert "already finished" in again.output
    assert "after the block: step 21 21" in again.output
    assert "in output_dir:\n" in again.output  # Nothing.


# Accelerate cuts no model on CPUs: the program has it do so.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "strikes"),
    [
        (("--fsdp",), ["5:SIGTERM"]),
        (("--fsdp", "--accumulate", 3, "--count", 26, "--no-time"), ["5:SIGTERM"]),
        (("--fsdp", SHARDED, "--lora"), ["5:SIGTERM"]),
        (("--trainer", "sft", "--lora"), ["5:SIGTERM"]),
    ],
    ids=["cut", "cut-micro-steps", "cut-adapter", "sft-adapter"],
)
def test_cut_models_and_adapters_on_two_ranks_resume_exactly(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, args: tuple[object, ...], strikes: list[str]
) -> None:
    if SHARDED in args and check.installed("accelerate") < (1, 13):
        ended = hf(tmp_path / "run", *args, processes=2)
        assert "Error: SpotCallback does not support FSDP2's SHARDED_STATE_DICT with accelerate below" in ended.output
        assert ended.code == 1
        return
    ends_alike(tmp_path / "run", tmp_path_factory, *args, "--until", 6, strikes=strikes, processes=2)


@pytest.mark.slow
def test_two_ranks_and_evaluations_at_the_end_of_epochs_resume_exactly(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    args = ("--log", 2, "--evaluate", "epoch", "--masks")
    ends_alike(tmp_path / "run", tmp_path_factory, *args, strikes=["6:SIGKILL", "8:SIGTERM", "12"], processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "strikes"),
    [
        (("--accumulate", 2, "--evaluate", "epoch", "--log", 5, "--masks"), ["4:SIGTERM", "6:SIGKILL"]),
        (("--accumulate", 3, "--no-time", "--count", 23, "--log", 2, "--masks"), ["7:SIGTERM", "8:SIGTERM"]),
        (("--lora", "--until", 9), ["6:SIGKILL"]),
        (("--patience", 1, "--evaluate", "steps", "--epochs", 6, "--count", 9), ["6:SIGTERM", "9"]),
        (("--trainer", "dpo", "--evaluate", "steps", "--log", 3), ["5:SIGTERM"]),
        (("--trainer", "seq2seq", "--evaluate", "epoch", "--log", 3), ["5:SIGTERM"]),
        (("--exact",), ["12:SIGKILL"]),
        (("--workers", 1, "--log", 1), ["9:SIGTERM"]),
    ],
    ids=lambda value: "-".join(str(word).lstrip("-") for word in value[:2]) if isinstance(value, tuple) else "",
)
def test_other_ways_to_train_resume_exactly(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, args: tuple[object, ...], strikes: list[str]
) -> None:
    ends_alike(tmp_path / "run", tmp_path_factory, *args, strikes=strikes)


@pytest.mark.slow
def test_another_number_of_processes_has_the_same_samples_and_learning_rates(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run, args = tmp_path / "run", ("--exact", "--no-dropout")
    whole = undisturbed(tmp_path_factory, *args, "--accumulate", 2)
    assert hf(run, *args, "--strike", "4:SIGTERM", processes=2).code == 75
    fewer = hf(run, *args, "--strike", "8:SIGTERM")
    assert fewer.code == 75, fewer.output
    assert "gradient_accumulation_steps is 2 now" in fewer.output
    done = hf(run, *args, processes=2)
    assert done.code == 0, done.output
    assert "the number of processes has changed" in done.output
    assert_resumed(run)
    assert column(run, "lr") == column(whole, "lr")
    ours, theirs = losses(run), losses(whole)
    assert ours.keys() == theirs.keys()
    assert all(abs(float(str(ours[step])) / float(str(theirs[step])) - 1) < 1e-5 for step in ours)
    other = hf(tmp_path / "run", *args, "--batch", 3)
    assert "config mismatch: this run was started with global_batch_size=4, not global_batch_size=3" in other.output


@pytest.mark.slow
def test_batches_by_length_are_said_not_to_be_exact(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    args = ("--grouped", "--no-dropout", "--until", 12)
    whole = undisturbed(tmp_path_factory, *args)
    assert hf(tmp_path / "run", *args, "--strike", "9:SIGTERM").code == 75
    done = hf(tmp_path / "run", *args)
    assert done.code == 0, done.output
    assert "group_by_length" in done.output
    assert "the Trainer draws another order when it resumes within an epoch" in done.output
    ours, theirs = losses(tmp_path / "run"), losses(whole)
    assert [ours[step] for step in range(1, 10)] == [theirs[step] for step in range(1, 10)]
    assert ours != theirs, "it is exact: the line and the docs can go"


@pytest.mark.slow(50)
def test_the_oldest_supported_transformers_resumes_exactly(tmp_path: Path) -> None:
    """Its package is installed beside; tests at the newest are all the others."""
    oldest = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", oldest, "--retries", "1"]
    install += ["--no-compile"]  # Of its 2,000 files and more, 400 are imported.
    got = subprocess.run([*install, "transformers==5.0.0", "tokenizers==0.22.2"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"pip cannot install it: {got.stderr.strip()[-200:]}")

    def run(name: str, *args: str) -> Ended:
        command = [sys.executable, "-m", "trainer.launch", "--processes", "1", SCRIPT, "--dir", tmp_path / name]
        command += ["--log", "3", "--evaluate", "steps", "--until", "9", "--masks", *args]
        env = clean_env(OMP_NUM_THREADS="1", PYTHONPATH=f"{oldest}:{REPO}")
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=150)
        return Ended(done.returncode, done.stdout + done.stderr)

    whole = run("whole")
    assert whole.code == 0, whole.output
    assert "transformers 5.0.0" in whole.output
    assert run("run", "--strike-in-evaluation", "6").code == 75
    done = run("run")
    assert done.code == 0, done.output
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert logged(done.output) == logged(whole.output)


@pytest.mark.slow
def test_a_partial_newest_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert hf(run, "--save-every", 2, "--strike", "5:SIGTERM").code == 75
    torn = RunPaths(run).checkpoint(list_checkpoints(RunPaths(run))[0])
    (torn / "share-00000.safetensors").unlink()
    ended = hf(run, "--strike", "6:SIGTERM")
    assert f"Checkpoint {torn.name} is not whole" in ended.output
    assert event(run, "restored")["step"] == 4


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        pytest.param("no callback", "resume_from(): first give SpotCallback(run)", marks=pytest.mark.slow),
        ("no resume", "call trainer.train(resume_from_checkpoint=run.resume_from())"),
        pytest.param("nan", "is not finite (NaN or infinite)", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_said_in_a_line(tmp_path: Path, mistake: str, message: str) -> None:
    ended = hf(tmp_path / "run", "--mistake", mistake)
    assert ended.code == 1
    assert message in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    ("deepspeed", "is_used", "version", "accelerate_is_old", "message"),
    [
        (None, True, 0, False, "DeepSpeed: use FSDP2"),
        ("zero2.json", False, 0, False, "DeepSpeed: use FSDP2"),  # Left out on CPUs.
        (None, False, 1, False, "FSDP1: use FSDP2"),
        (None, False, 2, True, "FSDP2's SHARDED_STATE_DICT with accelerate below 1.13"),
        (None, False, 2, False, ""),
    ],
)
def test_what_cuts_a_model_and_cannot_be_resumed_is_refused(
    monkeypatch: pytest.MonkeyPatch, deepspeed: object, is_used: bool, version: int, accelerate_is_old: bool,
    message: str,
) -> None:  # fmt: skip
    plugin = types.SimpleNamespace(fsdp_version=version, state_dict_type="StateDictType.SHARDED_STATE_DICT")
    monkeypatch.setattr(check, "installed", lambda name: (1, 12) if accelerate_is_old else (1, 13))
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(deepspeed=deepspeed), is_deepspeed_enabled=is_used, is_fsdp_enabled=version > 0,
        accelerator=types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin)),
    )  # fmt: skip
    assert unsupported_cut(trainer).startswith(message)
    assert bool(unsupported_cut(trainer)) == bool(message)


@pytest.mark.slow
def test_the_first_fsdp_is_refused(tmp_path: Path) -> None:
    first = '{"version": 1, "sync_module_states": false}'  # With them, it needs a GPU.
    ended = hf(tmp_path / "run", "--fsdp", first, processes=2)
    assert ended.code == 1
    assert "Error: SpotCallback does not support FSDP1: use FSDP2, with fsdp_config=" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
@pytest.mark.parametrize(("more", "processes"), [((), 1), (("--fsdp",), 2)], ids=["whole", "cut"])
def test_an_adapter_is_not_trained_on_another_base_model(
    tmp_path: Path, more: tuple[object, ...], processes: int
) -> None:
    args = ("--lora", "--until", 6, *more)
    assert hf(tmp_path / "run", *args, "--strike", "5:SIGTERM", processes=processes).code == 75
    other = hf(tmp_path / "run", *args, "--mistake", "another base", processes=processes)
    assert other.code == 1
    assert "Error: the frozen base model differs from the one that this run was started with" in other.output
    assert "Traceback" not in other.output
