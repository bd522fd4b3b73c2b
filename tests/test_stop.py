"""A request to save and stop, as `skyspot cancel` leaves it in the bucket: 79, for this launch and no other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from support import PROGRAMS, clean_env, event, history, launch, losses, mlp, weights

from trainer.layout.events import read_progress
from trainer.layout.names import RunPaths, list_attempts

TASK = "sky-managed-2026-01-01_run_7-0"


def ask(run_dir: Path, task: str = TASK, text: str = "{}") -> None:
    path = RunPaths(run_dir).stop(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def begin(run_dir: Path, *args: object, processes: int = 1) -> subprocess.Popen[str]:
    """Start faulty.py; returns when it has shown progress."""
    command = [sys.executable, "-m", "trainer.launch", "--processes", str(processes), "--grace", "20"]
    command += [str(PROGRAMS / "faulty.py"), "--dir", str(run_dir), *map(str, args)]
    process = warm.Popen(
        command, env=clean_env(SKYPILOT_TASK_ID=TASK), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 90
    paths = RunPaths(run_dir)
    while not any(read_progress(paths, name).get("step") for name in list_attempts(paths)):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


def await_end(run_dir: Path) -> dict[str, object]:
    end = time.monotonic() + 60
    while not (found := event(run_dir, "end")):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_asked_to_stop_saves_and_waits_to_be_cancelled(tmp_path: Path, processes: int) -> None:
    run_dir = tmp_path / "run"
    process = begin(run_dir, "--steps", 4000, "--save-every", 4000, "--samples", 8000, "--slow", 0.02,
                    "--constant", "training.journal.LOOK_S=0.2", processes=processes)  # fmt: skip
    ask(run_dir)
    found = await_end(run_dir)
    assert (found["code"], found["cause"]) == (79, "stop-request")
    assert found["step"] == found["committed_step"]
    with pytest.raises(subprocess.TimeoutExpired):  # It waits for SkyPilot's cancel.
        process.wait(1.5)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 79, output
    assert "Stop requested; saving step" in output
    assert RunPaths(run_dir).stop(TASK).exists(), "the request stays: a recovery of this launch must not go on"


def test_the_request_holds_for_every_attempt_of_its_launch_and_for_no_other(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert mlp(run_dir, "--fault", "sigterm@6", env=clean_env(SKYPILOT_TASK_ID=TASK)).code == 75
    ask(run_dir, text="")
    again = mlp(run_dir, env=clean_env(SKYPILOT_TASK_ID=TASK))
    assert again.code == 79, again.output
    assert "asks this launch to stop" in again.output
    later = mlp(run_dir, env=clean_env(SKYPILOT_TASK_ID=TASK.replace("_7-0", "_8-0")))
    assert later.code == 0, later.output
    assert event(run_dir, "restored")["lost_steps"] == 0
    assert sorted(losses(run_dir)) == list(range(1, 13))


def test_a_request_is_heard_while_evaluating_and_nothing_is_lost(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    impatient = ("--constant", "training.journal.LOOK_S=0.2", "--constant", "attempt.ending.STOP_REQUEST_S=1")
    stopped = mlp(run_dir, "--eval-every", 3, "--fault", "stop:eval@6", *impatient,
                  env=clean_env(SKYPILOT_TASK_ID=TASK))  # fmt: skip
    assert stopped.code == 79, stopped.output
    assert (event(run_dir, "end")["step"], event(run_dir, "end")["committed_step"]) == (6, 6)
    whole = tmp_path / "whole"
    assert mlp(whole, "--eval-every", 3).code == 0
    later = mlp(run_dir, "--eval-every", 3, env=clean_env(SKYPILOT_TASK_ID="another"))
    assert later.code == 0, later.output
    assert event(run_dir, "restored")["lost_steps"] == 0
    assert losses(run_dir) == losses(whole)
    assert weights(run_dir) == weights(whole)
    evaluated = [[line["eval_loss"] for line in history(one) if "eval_loss" in line] for one in (run_dir, whole)]
    assert evaluated[0] == evaluated[1]


def test_a_finished_run_is_not_stopped(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert mlp(run_dir, env=clean_env(SKYPILOT_TASK_ID=TASK)).code == 0
    ask(run_dir)
    assert mlp(run_dir, env=clean_env(SKYPILOT_TASK_ID=TASK)).code == 0


@pytest.mark.slow
def test_a_script_that_keeps_no_records_is_stopped_by_its_launcher(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import signal, sys, time\nprint('up', flush=True)\nsignal.signal(15, lambda *_: sys.exit(75))\n"
                      "time.sleep(120)\n")  # fmt: skip
    run_dir = tmp_path / "run"
    env = clean_env(SKYPILOT_TASK_ID=TASK, SKYSPOT_CHECKPOINT_DIR=str(run_dir))
    process = warm.Popen(
        [sys.executable, "-m", "trainer.launch", str(script)], env=env, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    ask(run_dir)
    await_end(run_dir)
    with pytest.raises(subprocess.TimeoutExpired):  # It waits for SkyPilot's cancel.
        process.wait(1.5)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 79
    assert (event(run_dir, "end")["code"], event(run_dir, "end")["cause"]) == (79, "stop-request")
    again = launch(script, env=env)
    assert again.code == 79
    assert "asks this launch to stop" in again.output
