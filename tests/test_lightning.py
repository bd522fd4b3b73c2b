"""Lightning's trainer with SpotCallback: struck at any step, it ends with the same bits and the same calls of hooks."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import shared
import warm
from curves import recorded, shown
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
from torch.utils.data import DataLoader

from trainer.training.registered import Registered

if importlib.util.find_spec("lightning") is None:  # An import would take each worker seconds.
    pytest.skip("a training with Lightning: pip install 'lightning>=2.5,<2.7'", allow_module_level=True)

Case = tuple[str, Sequence[object], Sequence[str]]
"""(name, options of lightning_loop.py, strikes)."""
# 18 items in batches of 4: 5 batches an epoch, a validation after 2 and 4 of them, a save every 3 steps.
ENDS = ("--options", '{"val_check_interval": 1.0}')
"""A validation at each epoch's end alone."""
REPORTS = ("--report-to", "tensorboard", "--options", '{"logger": true}')
"""To a tracker of ours, beside Lightning's own logger."""
QUICK: list[Case] = [
    ("shuffle", REPORTS, ("7:SIGKILL", "8:SIGTERM", "19:SIGTERM")),
    ("in validations", ("--epochs", 2), ("v2:SIGTERM", "v2:SIGTERM", "v4:SIGTERM")),
]
SLOW: list[Case] = [
    ("accumulate", ("--accumulate", 2), ("4:SIGTERM", "7:SIGKILL")),
    ("epoch's end", (), ("5:SIGTERM", "6:SIGTERM", "15:SIGKILL")),
    ("by hand", ("--kind", "by-hand"), ("9:SIGTERM", "31:SIGKILL")),
    ("stateful", ("--kind", "stateful"), ("4:SIGTERM", "7:SIGKILL", "11:SIGTERM")),
    ("stream", ("--kind", "stream"), ("4:SIGTERM", "8:SIGTERM")),
    ("noise", ("--kind", "noise"), ("4:SIGTERM", "9:SIGKILL")),
    ("workers", ("--kind", "workers"), ("4:SIGTERM", "9:SIGKILL")),
    ("steps", ("--steps", 13), ("4:SIGTERM", "9:SIGKILL")),
    ("patience", ("--patience", 1, "--epochs", 9), ("4:SIGTERM", "6:SIGTERM")),
    # A validation after 3 of 5 batches; one schedule follows it after 5, one at the epoch's end.
    ("plateau", ("--options", '{"val_check_interval": 3}', "--kind", "plateau"), ("9:SIGTERM", "v13:SIGTERM")),
    ("ends", ENDS, ("v5:SIGTERM", "v15:SIGTERM", "v20:SIGTERM")),
    ("stateful ends", (*ENDS, "--kind", "stateful"), ("v5:SIGTERM", "v10:SIGTERM")),
    ("stream ends", (*ENDS, "--kind", "stream"), ("v5:SIGTERM", "v20:SIGTERM")),
    ("last step", ("--steps", 7), ("v7:SIGTERM", "v7:SIGTERM")),
    ("patience ends", (*ENDS, "--patience", 1, "--epochs", 9), ("v5:SIGTERM", "v10:SIGTERM")),
    ("averaged", ("--kind", "average"), ("v4:SIGTERM",)),
    ("by hand in validations", ("--kind", "by-hand"), ("v8:SIGTERM",)),
    ("estimated stream", ("--kind", "stream", "--estimated"), ("4:SIGTERM", "8:SIGTERM")),
    ("estimated stateful", ("--kind", "stateful", "--estimated"), ("4:SIGTERM", "11:SIGTERM")),
    ("dropped", ("--accumulate", 3, "--no-time"), ("2:SIGTERM", "5:SIGTERM")),
]


def attempts(*arguments: Sequence[object], packages: Path | None = None) -> list[Ended]:
    """Run attempts of lightning_loop.py, one after the other."""
    env = clean_env(OMP_NUM_THREADS="1", **({"PYTHONPATH": str(packages)} if packages else {}))
    given = json.dumps([[str(one) for one in argument] for argument in arguments])
    command = [sys.executable, str(PROGRAMS / "lightning_lives.py"), given]
    start = subprocess.run if packages else warm.run
    done = start(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=500)
    parts = re.split(r"== ended with (-?\d+)\n", done.stdout)
    assert len(parts) == 2 * len(arguments) + 1, done.stdout
    return [Ended(int(code), output) for output, code in zip(parts[::2], parts[1::2], strict=False)]


def calls(ended: Ended) -> list[str]:
    return re.findall(r"^calls: (.*)$", ended.output, flags=re.M)[0].split("; ")


def means(ended: Ended) -> dict[int, float]:
    """For each epoch that ended in an attempt, the mean of its losses as Lightning computes it."""
    found = json.loads(re.findall(r"^means: (.*)$", ended.output, flags=re.M)[0])
    return {int(epoch): mean for epoch, mean in found.items()}


def exported(run_dir: Path) -> tuple[dict[str, bytes], str]:
    return weights(run_dir), (run_dir / "final" / "values.json").read_text()


def lives(cases: Sequence[Case], folder: Path) -> list[Sequence[object]]:
    """The attempts of each case, undisturbed and struck."""
    given: list[Sequence[object]] = []
    for name, options, strikes in cases:
        (folder / name).mkdir()
        whole, struck = folder / name / "whole", folder / name / "struck"
        given.append(("--dir", whole, *options))
        given += [("--dir", struck, *options, "--strike", strike) for strike in strikes]
        given.append(("--dir", struck, *options))
    return given


def compare(cases: Sequence[Case], folder: Path, done: Sequence[Ended]) -> None:
    """Compare the struck run of each case with the undisturbed one."""
    left = iter(done)
    for name, _, strikes in cases:
        whole, struck = folder / name / "whole", folder / name / "struck"
        undisturbed = next(left)
        assert undisturbed.code == 0, f"{name}: {undisturbed.output}"
        for strike in strikes:
            ended = next(left)
            assert ended.code == (75 if strike.endswith("SIGTERM") else -9), f"{name}, {strike}: {ended.output}"
        last = next(left)
        assert last.code == 0, f"{name}: {last.output}"
        assert_resumed(struck)
        assert losses(struck) == losses(whole), name
        assert column(struck, "lr") == column(whole, "lr"), name
        assert exported(struck) == exported(whole), name
        assert _line(last) == _line(undisturbed), name
        # No epoch begins again, and no validation is repeated or passed by.
        assert calls(undisturbed)[len(calls(undisturbed)) - len(calls(last)) :] == calls(last) or calls(last) == [""]


def check(cases: Sequence[Case], folder: Path, packages: Path | None = None) -> list[Ended]:
    """Run each case undisturbed and struck, all in one process, and compare."""
    done = attempts(*lives(cases, folder), packages=packages)
    compare(cases, folder, done)
    return done


def _line(ended: Ended) -> tuple[str, str]:
    """The run's steps, and the step of Lightning's loggers."""
    found = re.search(r"^after the block: step (\d+), \d+ items, (\d+)$", ended.output, flags=re.M)
    assert found, ended.output
    return found.group(1), found.group(2)


def metrics_at(run_dir: Path) -> list[object]:
    """The steps whose records have a validation's metrics."""
    return [line["step"] for line in history(run_dir) if "val_loss" in line]


def limited(**limits: object) -> list[str]:
    return [f"--env={name}={value}" for name, value in limit_variables(**limits).items()]


TOMORROW = datetime.fromtimestamp(time.time() + 86400, timezone.utc).isoformat()
LIMITED: list[Sequence[object]] = [
    ("--strike", "7:limit", *limited(max_spend=900)),
    limited(max_spend=900),
    ("--strike", "13:limit", *limited(deadline=TOMORROW)),
    limited(max_spend=1900),
]
"""A run that reaches its limit in money, is started again under the same one, and reaches one in time."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """The folder of the runs of QUICK and LIMITED, and how their attempts ended; all are of one process."""

    def build(empty: Path) -> None:
        (empty / "limited").mkdir()
        limits = [("--dir", empty / "limited" / "run", *options) for options in LIMITED]
        done = attempts(*lives(QUICK, empty), *limits)
        (empty / "ended.json").write_text(json.dumps([[one.code, one.output] for one in done]))

    folder = shared.built_once(tmp_path_factory, "lightning-quick", build)
    return folder, [Ended(*one) for one in json.loads((folder / "ended.json").read_text())]


def test_a_training_ends_with_the_same_bits_however_often_it_is_struck(quick: tuple[Path, list[Ended]]) -> None:
    folder, done = quick
    compare(QUICK, folder, done)
    assert metrics_at(folder / "in validations" / "whole") == [2, 4, 7, 9]
    assert metrics_at(folder / "in validations" / "struck") == [3, 5, 7, 9], "the first two were cut short"
    done = done[:5]
    assert "ModelCheckpoint is set aside" in done[0].output
    assert "is not saved" not in done[0].output, "what hooks save is known"
    lines = {line["step"]: line for line in history(folder / "shuffle" / "struck")}
    assert sorted(lines) == list(range(1, 21))
    # The stop in step 19 came before its validation.
    assert metrics_at(folder / "shuffle" / "struck") == [2, 4, 7, 9, 12, 14, 17, 20]
    assert [ended.output.count("resumed at step 8 from") for ended in done] == [0, 0, 0, 1, 0], "a notice loses no step"
    # Footnote 2 of the docs: the mean over an epoch with a resume, at step 19, is that of the steps after it.
    loss = {step: float(str(value)) for step, value in losses(folder / "shuffle" / "whole").items()}
    assert means(done[0])[3] == pytest.approx(sum(loss[step] for step in range(16, 21)) / 5)
    assert means(done[-1]) == {3: pytest.approx(loss[20])}


def test_a_run_that_reports_has_one_curve_beside_lightnings_own(quick: tuple[Path, list[Ended]]) -> None:
    folder = quick[0] / "shuffle"
    curve = shown(folder / "struck")
    assert [step for step, _ in curve["loss"]] == list(range(1, 21))
    assert [step for step, _ in curve["val_loss"]] == [2, 4, 7, 9, 12, 14, 17, 20]
    for name in ("loss", "val_loss", "lr"):
        assert curve[name] == recorded(folder / "struck", name), name
    assert len(list((folder / "lightning_logs").glob("version_*"))) == 5, "one folder an attempt, of both runs"


def test_at_a_limit_a_run_saves_leaves_with_79_and_goes_on_exactly_once_it_is_raised(
    quick: tuple[Path, list[Ended]],
) -> None:
    folder, run_dir = quick[0], quick[0] / "limited" / "run"
    ended = quick[1][-len(LIMITED) :]
    assert [one.code for one in ended] == [79, 79, 79, 0], ended
    ends = [event(run_dir, "end", attempt) for attempt in range(3)]
    assert [(end["cause"], end["step"]) for end in ends] == [("max-spend", 7), ("max-spend", 0), ("deadline", 13)]
    assert [end["committed_step"] for end in ends] == [7, None, 13]
    assert "not started: the spend limit" in ended[1].output
    assert event(run_dir, "restored")["step"] == 13
    assert losses(run_dir) == losses(folder / "shuffle" / "whole")
    assert exported(run_dir) == exported(folder / "shuffle" / "whole")


@pytest.mark.slow(60)
def test_every_kind_of_loop_and_loader_ends_with_the_same_bits(tmp_path: Path) -> None:
    outputs = "".join(ended.output for ended in check(SLOW, tmp_path))
    assert outputs.count("The validation uses other weights than the training, so the run stops after it") == 1
    assert metrics_at(tmp_path / "averaged" / "struck") == metrics_at(tmp_path / "averaged" / "whole")
    stopped = tmp_path / "patience" / "struck"
    noise = ("--dir", tmp_path / "noise" / "struck", "--kind", "noise")
    again, done, more = attempts(("--dir", stopped, "--patience", 1, "--epochs", 9), noise, (*noise, "--epochs", 5))
    assert "already finished" in again.output, "an early stop is not forgotten"
    assert done.code == more.code == 0, done.output + more.output
    assert "already finished" in done.output
    assert sorted(losses(tmp_path / "noise" / "struck")) == list(range(1, 26))


@pytest.mark.slow
def test_more_steps_after_the_end_continue_where_it_was(tmp_path: Path) -> None:
    for steps in (7, 10):  # Within an epoch, and at its end.
        short, whole = tmp_path / f"short-{steps}", tmp_path / f"whole-{steps}"
        done = attempts(
            ("--dir", short, "--steps", steps), ("--dir", short, "--steps", 13), ("--dir", whole, "--steps", 13)
        )
        assert [ended.code for ended in done] == [0, 0, 0], done
        assert losses(short) == losses(whole)
        assert weights(short) == weights(whole)


@pytest.mark.slow
def test_two_processes_stop_together_and_end_with_the_same_bits(tmp_path: Path) -> None:
    whole, struck, alone = tmp_path / "whole", tmp_path / "struck", (tmp_path / "alone", tmp_path / "estimated")
    program, options = PROGRAMS / "lightning_loop.py", ("--count", 40, "--epochs", 2, "--validate", 16)
    assert launch(program, "--dir", whole, *options, processes=2).code == 0
    ended = noticed(program, "--dir", struck, *options, "--strike", "7:notice", processes=2)
    assert ended.code == 75, ended.output
    for folder in alone:
        shutil.copytree(struck, folder)
    ended = noticed(program, "--dir", struck, *options, "--strike", "v9:notice", processes=2)
    assert ended.code == 75, ended.output
    assert event(struck, "restored")["step"] == 7
    last = launch(program, "--dir", struck, *options, processes=2)
    assert last.code == 0, last.output
    assert event(struck, "restored")["step"] == 9
    assert metrics_at(struck) == [2, 4, 8, 10], "the validations after steps 7 and 9 were cut short"
    assert losses(struck) == losses(whole)
    assert exported(struck) == exported(whole)
    # On another number of processes: 5 batches an epoch became 10.
    given = [("--dir", folder, *options, *(["--estimated"] if folder is alone[1] else [])) for folder in alone]
    for folder, other in zip(alone, attempts(*given), strict=True):
        assert other.code == 0, other.output
        assert "16 samples of epoch 1; 1 continue after 4 batches each. Random numbers are new" in other.output
        assert sorted(losses(folder)) == list(range(1, 7 + 6 + 1))


def test_what_is_not_supported_is_said_in_a_line(tmp_path: Path) -> None:
    wrong = {
        "fit(ckpt_path='x.ckpt') and the run's folder cannot both be resumed from": (
            "--fit",
            '{"ckpt_path": "x.ckpt"}',
        ),
        "several training loaders are not supported": ("--kind", "two-loaders"),
        "a run has one fit()": ("--kind", "two-fits", "--epochs", 1),
        "OddStrategy is not supported": ("--kind", "odd-strategy"),
    }
    given = [("--dir", tmp_path / str(number), *options) for number, options in enumerate(wrong.values())]
    for message, ended in zip(wrong, attempts(*given), strict=True):
        assert ended.code == 1, ended.output
        assert f"Error: SpotCallback: {message}" in ended.output
        assert "Traceback" not in ended.output


def test_an_epoch_of_another_number_of_processes_goes_on_where_it_was() -> None:
    from trainer import lightning

    contents = Registered(False, {})
    contents.loop, contents.done = "lightning", 7
    contents.data.epoch, contents.data.batches, contents.data.samples, contents.data.processes_then = 1, 2, 16, 2
    run: Any = SimpleNamespace(_loop=lambda: SimpleNamespace(contents=contents), world_size=1, print_line=print)
    trainer: Any = mock.MagicMock(accumulate_grad_batches=1, current_epoch=1)
    loader = lightning._Loader(DataLoader(range(40), batch_size=4), lightning.SpotCallback(run), trainer)  # type: ignore[arg-type]
    assert [batch.tolist()[0] for batch in loader] == [16, 20, 24, 28, 32, 36]
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4


@pytest.mark.parametrize(
    ("mine", "others", "looks"),
    [([3], [3], True), ([3], [4], False), ([3, math.inf], [3, math.inf], False), ([math.inf], None, True)],
)
def test_ranks_look_for_a_stop_in_a_validation_if_all_have_as_many_batches(
    mine: list[float], others: list[float] | None, looks: bool
) -> None:
    """Else one would wait in its look for another that is past its last batch."""
    from trainer import lightning

    sent: list[list[int]] = []

    def exchange(row: list[int]) -> Any:
        sent.append(row)
        return SimpleNamespace(wait=lambda: sent)

    run: Any = SimpleNamespace(group=SimpleNamespace(exchange=exchange))
    for batches in filter(None, (others, mine)):
        trainer: Any = mock.MagicMock()
        trainer.fit_loop.epoch_loop.val_loop.max_batches = batches
        found = lightning.SpotCallback(run)._has_equal_validations(trainer)
    assert found == looks


@pytest.mark.slow
def test_processes_that_lightning_starts_itself_are_refused(tmp_path: Path) -> None:
    options = json.dumps({"devices": 2, "strategy": "ddp"})
    command = [
        sys.executable,
        str(PROGRAMS / "lightning_loop.py"),
        "--dir",
        str(tmp_path / "run"),
        "--options",
        options,
    ]
    done = warm.run(command, capture_output=True, text=True, env=clean_env(OMP_NUM_THREADS="1"), timeout=300)
    assert done.returncode
    assert "Error: WORLD_SIZE is 2, but RANK is not set: start the script with `python -m trainer.launch" in done.stderr


@pytest.mark.slow(40)
def test_the_oldest_supported_release_works(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), "lightning==2.5.0"]
    got = subprocess.run(install, capture_output=True, text=True, timeout=120, env={**os.environ, "PIP_NO_INPUT": "1"})
    if got.returncode:
        pytest.skip(f"lightning 2.5.0 cannot be installed: {got.stderr.strip().splitlines()[-1]}")
    done = check([*QUICK, SLOW[2]], tmp_path, packages)
    assert "lightning 2.5.0" in done[0].output
