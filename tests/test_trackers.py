"""--report-to: a run that is preempted has one curve in each tracker, each step once and none missing."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate import tracking as accelerate_tracking
from clock import Clock
from curves import recorded, shown
from faultfs import Client
from in_process import Attempts
from support import event, losses, train
from torch.utils.data import DataLoader

from trainer import SpotRun
from trainer.layout.names import AttemptName, RunPaths, list_attempts
from trainer.trackers import reporter, tracking
from trainer.trackers.curve import Point
from trainer.trackers.tensorboard import TensorBoard
from trainer.trackers.tracker import Tracked

UNTIL = 12


def loop(run: SpotRun, strike: Callable[[], None]) -> None:
    """A loop of somebody's own that logs numbers, text and a value that is not finite."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run.register(model=model, optimizer=optimizer)
    loader = DataLoader(torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), batch_size=4, shuffle=True)
    for batch in run.steps(loader, until=UNTIL):
        strike()
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss, note="text", odd=run.step % 2 == 1, spoilt=float("nan"))
    run.finish()


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "PUBLISH_S", 0.0)
    monkeypatch.setattr(reporter, "PUBLISH_SHARE", 0.0)


@pytest.mark.usefixtures("patient")
def test_each_step_is_shown_once_after_a_crash_beyond_a_checkpoint_and_a_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    attempts = Attempts(tmp_path / "my run")
    assert attempts.one(loop, 9, "crash", report_to="tensorboard") == 1
    assert [step for step, _ in shown(attempts.folder)["loss"]] == list(range(1, 9)), "two beyond the checkpoint"
    assert attempts.one(loop, 8, "stop", report_to="tensorboard") == 75
    assert event(attempts.folder, "restored")["lost_steps"] == 2
    assert attempts.one(loop, report_to="tensorboard") == 0
    curve = shown(attempts.folder)
    assert [step for step, _ in curve["loss"]] == list(range(1, UNTIL + 1))
    assert curve["loss"] == recorded(attempts.folder, "loss")
    assert curve["lr"] == recorded(attempts.folder, "lr")
    assert [value for _, value in curve["odd"]] == [step % 2 for step in range(UNTIL)]
    assert len(curve["spoilt"]) == UNTIL
    assert np.isnan(curve["spoilt"][0][1])
    assert not {"note", "step", "monotonic", "world_size"} & curve.keys()
    output = capfd.readouterr().out
    assert f"tensorboard: tensorboard --logdir {attempts.folder}/tensorboard" in output
    ids = {event(attempts.folder, "tracking", attempt)["id"] for attempt in range(3)}
    assert ids == {f"my_run-{list_attempts(RunPaths(attempts.folder))[0].token}"}
    # The same run again: it is finished, and nothing is added.
    assert attempts.one(loop, report_to="tensorboard") == 0
    assert repr(shown(attempts.folder)) == repr(curve)


def points(*steps: int, of: int = 1) -> list[Point]:
    return [Point(step, {"loss": 100.0 * of + step}) for step in steps]


def report(run_dir: Path, number: int, before: list[Point], lines: list[Point], **options: Any) -> list[str]:
    """Report an attempt to TensorBoard; returns the lines that were printed."""
    run = Tracked(RunPaths(run_dir), AttemptName(number, f"{number:06x}"), "id", {})
    printed: list[str] = []
    one = reporter.Reporter(TensorBoard(run), lambda: before, lambda: None, printed.append)
    for line in lines:
        one.take(line)
    one.end(everything=True)
    assert one.over.wait(60)
    return printed


def test_whatever_an_attempt_left_of_its_event_files_the_next_one_shows_the_whole_curve(tmp_path: Path) -> None:
    """A kill may tear a file at any byte, or lose it: those of attempt 1 reach two steps beyond the checkpoint."""
    report(tmp_path / "whole", 1, [], points(1, 2, 3, 4))
    [part] = (tmp_path / "whole" / "tensorboard").iterdir()
    data = part.read_bytes()
    expected = [(1, 101.0), (2, 102.0), (3, 203.0), (4, 204.0)]
    for size in [*range(0, len(data), 23), len(data)]:
        folder = tmp_path / f"torn-{size}" / "tensorboard"
        folder.mkdir(parents=True)
        (folder / part.name).write_bytes(data[:size])
        report(folder.parent, 2, points(1, 2), points(3, 4, of=2))
        assert shown(folder.parent)["loss"] == expected, size
        # A viewer that has read the first file already, or whose bucket still lists it.
        (folder / part.name).write_bytes(data[:size])
        assert shown(folder.parent)["loss"] == expected, size


def test_parts_of_an_attempt_make_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    report(tmp_path, 1, points(1, 2), points(3, 4, 5, 6))
    assert len(list((tmp_path / "tensorboard").iterdir())) > 1
    assert [step for step, _ in shown(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("patient")
def test_a_mount_that_neither_appends_nor_seeks_has_one_curve_after_a_crash_and_a_stop(
    faults: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once(monkeypatch)
    attempts = Attempts(faults.point / "run")
    for strike, kind, code in ((9, "crash", 1), (8, "stop", 75), (0, "stop", 0)):
        assert attempts.one(loop, strike, kind, report_to="tensorboard") == code
    store = tmp_path / "behind" / "run"
    curve = shown(store)["loss"]
    assert [step for step, _ in curve] == list(range(1, UNTIL + 1))
    assert curve == recorded(store, "loss")
    assert "training goes on" not in capfd.readouterr().out, "the mount has refused nothing"


def test_accelerates_logger_stays_whole_for_trackers_of_the_programs_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's and ClearML's warn once, which no plain logger can."""
    report(tmp_path, 1, [], points(1))
    PartialState(cpu=True)
    accelerate_tracking.logger.warning_once("an odd value")
    accelerate_tracking.logger.warning("on every rank", main_process_only=False)
    lines = [one.getMessage() for one in caplog.records if one.name == accelerate_tracking.__name__]
    assert [line.removeprefix("[RANK 0] ") for line in lines] == ["an odd value", "on every rank"]


def test_a_bucket_that_refuses_or_a_tracker_that_hangs_delays_no_step_and_no_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once(monkeypatch)
    attempts = Attempts(tmp_path / "refused")
    attempts.folder.mkdir()
    (attempts.folder / "tensorboard").write_text("a file")
    assert attempts.one(loop, report_to="tensorboard") == 0
    assert (
        capfd.readouterr().out.count(f"tensorboard: {attempts.folder}/tensorboard: File exists; training goes on") == 1
    )
    assert sorted(losses(attempts.folder)) == list(range(1, UNTIL + 1))
    attempts = Attempts(tmp_path / "fails")
    monkeypatch.setattr(TensorBoard, "log", lambda *_: 1 / 0)
    assert attempts.one(loop, report_to="tensorboard") == 0
    assert capfd.readouterr().out.count("ZeroDivisionError: division by zero. It gets no more of this attempt") == 1
    hangs = threading.Event()
    monkeypatch.setattr(TensorBoard, "log", lambda *_: hangs.wait(60))
    monkeypatch.setattr(tracking, "STOPPED_S", 0.1)
    attempts = Attempts(tmp_path / "hangs")
    assert attempts.one(loop, 8, report_to="tensorboard") == 75
    assert event(attempts.folder, "end")["committed_step"] == 8
    assert "tensorboard: not all metrics got there in time. The run's records have them." in capfd.readouterr().out
    hangs.set()


class Hanging:
    """Stands for a reporter whose tracker never answers; waiting for it passes time of the test's clock."""

    def __init__(self, clock: Clock) -> None:
        self.tracker = self.over = self
        self.name, self._clock = "wandb", clock

    def end(self, _is_finished: bool) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        self._clock.added += seconds
        return False


@pytest.mark.parametrize(
    ("is_finished", "left_s", "most_s"),
    [(False, None, 5), (False, 120, 5), (False, 4, 2), (False, 1, 0), (True, None, 60)],
)
def test_trackers_that_hang_delay_the_end_by_a_few_seconds_in_all(
    clock: Clock, is_finished: bool, left_s: float | None, most_s: float
) -> None:
    trackers = tracking.Tracking(
        (), Tracked(RunPaths(Path("run")), AttemptName(1, "0" * 6), "run", {}), (), lambda: None, print
    )
    trackers._reporters = [Hanging(clock), Hanging(clock), Hanging(clock)]
    begun = time.monotonic()
    assert trackers.end(is_finished, None if left_s is None else begun + left_s) == ["wandb"] * 3
    assert time.monotonic() - begun == pytest.approx(most_s, abs=0.01)


@pytest.mark.usefixtures("patient")
def test_a_damaged_file_of_the_records_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    attempts = Attempts(tmp_path / "run")
    assert attempts.one(loop, 8, report_to="tensorboard") == 75
    [first, *_] = sorted(attempts.folder.glob("attempts/*/metrics-*"))
    first.write_bytes(first.read_bytes().replace(b"loss", b"LOSS"))
    assert attempts.one(loop, report_to="tensorboard") == 0
    assert f"{first} is damaged: steps 1 to 3 are missing" in capfd.readouterr().out
    assert [step for step, _ in shown(attempts.folder)["loss"]] == list(range(4, UNTIL + 1))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("tensorbord", "'tensorbord' is none of tensorboard, wandb, trackio. Did you mean 'tensorboard'?"),
        (["tensorboard", 3], "is no list of names"),
        (None, "None is no list of names"),
    ],
)
def test_an_unknown_tracker_is_refused_in_a_line(
    given: Any, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert Attempts(tmp_path / "run").one(loop, report_to=given) == 1
    [error] = capfd.readouterr().err.splitlines()
    assert error.startswith("Error: SpotRun(report_to=...): ")
    assert error.endswith(line)


def test_a_tracker_that_is_not_installed_is_refused_before_the_attempt(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert Attempts(tmp_path / "run").one(loop, report_to=["tensorboard"]) == 1
    assert capfd.readouterr().err == (
        "Error: tensorboard: not installed on this machine. To report there: pip install tensorboard\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_bundled_trainer_reports_too(tmp_path: Path) -> None:
    text, run_dir = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"line {number}: {number * number}\n" for number in range(75)))
    options = ("--checkpoint-dir", run_dir, "--data", text, "--max-steps", 4, "--save-every", 2, "--seq-len", 32)
    options += ("--warmup-steps", 2, "--cpu", "--report-to", "tensorboard,tensorboard")
    done = train(*options)
    assert done.code == 0, done.output
    assert shown(run_dir)["loss"] == recorded(run_dir, "loss")
    refused = train(*options, "--report-to", "wandbb")
    assert refused.code == 2
    assert refused.output == (
        "Error: --report-to: 'wandbb' is none of tensorboard, wandb, trackio. Did you mean 'wandb'?\n"
    )
