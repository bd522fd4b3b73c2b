"""CheckpointManager: a loop that calls save and load_latest by itself is stopped, killed and resumed like any other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PROGRAMS, REPO, Ended, clean_env, event, launch

from trainer.layout.names import RunPaths, list_checkpoints

SCRIPT = PROGRAMS / "managed.py"


def attempt(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    return launch(SCRIPT, run_dir, *args, processes=processes)


def exported(run_dir: Path) -> dict[str, Any]:
    return {name: value.tolist() for name, value in torch.load(run_dir / "model.pt").items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_managed_loop_ends_with_the_same_weights_however_it_is_struck(tmp_path: Path, processes: int) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert attempt(whole, processes=processes).code == 0
    struck = attempt(run, "--strike", "3:SIGTERM", processes=processes)
    assert struck.code == 75, struck.output
    assert (event(run, "end")["cause"], event(run, "end")["committed_step"]) == ("signal", 3)
    if processes > 1:
        assert attempt(run, "--strike", "9:SIGKILL", processes=processes).code == 75
    done = attempt(run, processes=processes)
    assert done.code == 0, done.output
    assert f"begins at {8 if processes > 1 else 3} with {{'seen': {{0, 1, 2}}}}" in done.output
    assert event(run, "end")["cause"] == "finished"
    assert exported(run) == exported(whole)
    assert sorted(name.step for name in list_checkpoints(RunPaths(run))) == [16, 20], "keep=2; all others are deleted"


@pytest.mark.slow
@pytest.mark.parametrize("end", ["break", "sys.exit", "raise"])
def test_an_interrupted_process_leaves_with_75_however_it_ends(tmp_path: Path, end: str) -> None:
    struck = attempt(tmp_path / "run", "--strike", "3:SIGTERM", "--end", end)
    assert struck.code == 75, struck.output
    assert (event(tmp_path / "run", "end")["cause"], event(tmp_path / "run", "end")["committed_step"]) == ("signal", 3)


def test_a_loop_that_looks_within_a_step_saves_the_steps_that_are_done(tmp_path: Path) -> None:
    struck = attempt(tmp_path / "run", "--strike", "3:SIGTERM", "--end", "within")
    assert struck.code == 75, struck.output
    assert (event(tmp_path / "run", "end")["cause"], event(tmp_path / "run", "end")["committed_step"]) == ("signal", 2)


@pytest.mark.slow
def test_without_a_launcher_it_leaves_with_75_too(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "run", "--strike", "3:SIGTERM", "--end", "break"]
    env = clean_env(OMP_NUM_THREADS="1")
    # Not warm: the end of an interpreter is what is tested.
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=150, env=env)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "ends at 3" in done.stdout
    assert event(tmp_path / "run", "end")["cause"] == "signal"


TASK = """
name: managed
resources: {{use_spot: true, job_recovery: {{strategy: FAILOVER, recover_on_exit_codes: [75]}}}}
envs: {{SKYSPOT_CHECKPOINT_DIR: /checkpoints/run, OMP_NUM_THREADS: "1"}}
file_mounts:
  /checkpoints: {{name: my-bucket, mode: MOUNT}}
  ~/code/managed.py: {script}
  ~/code/trainer: {trainer}
run: cd ~/code && exec python -m trainer.launch --processes 1 managed.py /checkpoints/run --until 1500 --save-every 50
"""


@pytest.mark.slow
def test_a_managed_loop_is_rehearsed(tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(TASK.format(script=SCRIPT, trainer=REPO / "trainer"))
    command = [sys.executable, "-m", "skyspot", "rehearse", task, "--processes", "1", "--compare", "run/model.pt"]
    command += ["--preemptions", "2", "--kinds", "sigterm,kill"]
    done = subprocess.run(
        command, cwd=REPO, env=clean_env(HOME=str(tmp_path)), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Preempted: byte-identical: 1 of 1 files (run/model.pt)" in done.stdout


USE = """
from trainer import CheckpointManager
import torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
manager = CheckpointManager({run}{options})
load = manager.load_latest
{body}
"""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"options": ", save_every='auto'"}, "CheckpointManager(save_every='auto'): give a number of steps"),
        ({"options": ", keep=1"}, "CheckpointManager(keep=1): keep at least 2 checkpoints"),
        ({"body": "manager.save(1, model=model)"}, "CheckpointManager.save needs load_latest(...) first"),
        (
            {"body": "manager.load_latest(best=3)"},
            "load_latest(best=...): int has no state_dict and load_state_dict. Put it into manager.state",
        ),
        (
            {"body": "load(model=model); manager.save(1, model=model, optimizer=optimizer)"},
            "save(optimizer=...): load_latest() did not get it",
        ),
        (
            {"body": "load(model=model); manager.save(1, model=torch.nn.Linear(2, 1))"},
            "save(model=...): this is another object than the one that load_latest() got",
        ),
        ({"body": "load(model=model); manager.save(0, model=model)"}, "save(step=0): give the steps done"),
        ({"body": "load(model=model); manager.exit()"}, "exit(): nothing has interrupted this attempt"),
        (
            {"body": "load(model=model); model.weight.data.fill_(torch.nan); manager.save(1, model=model)"},
            "step 1: model.model.weight is not finite",
        ),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_a_mistake_is_said_in_a_line(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(USE.format(**{"options": "", "body": "", "run": repr(str(tmp_path / "run")), **changed}))
    ended = launch(script)
    assert ended.code == 1, ended.output
    assert f"Error: {message}" in ended.output
    assert "Traceback" not in ended.output
