"""Where a signal falls: on the launcher, one rank, their process group, or a shell in front of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import warm
from support import PROGRAMS, clean_env, event

from skyspot.rehearsal.watch import is_committed
from trainer.layout.names import RunPaths, list_checkpoints

SAVES = """
import os, signal, sys, time
folder, rank, stop = sys.argv[1], os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with open(folder + "/rank" + rank + ".new", "w") as file:
    file.write(str(os.getpid()))
os.replace(folder + "/rank" + rank + ".new", folder + "/rank" + rank)
while not stop and not os.path.exists(folder + "/finish"):
    time.sleep(0.01)
if stop:
    open(folder + "/saved" + rank, "w").close()
    sys.exit(75)
"""


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def command(folder: Path, *options: object, processes: int = 2) -> list[str]:
    (folder / "script.py").write_text(SAVES)
    options = ("--processes", processes, *options)
    return [sys.executable, "-m", "trainer.launch", *map(str, options), str(folder / "script.py"), str(folder)]


@pytest.mark.parametrize("where", ["launcher", "rank", "group", "shell"])
def test_every_rank_saves_and_none_is_left_wherever_a_sigterm_falls(tmp_path: Path, where: str) -> None:
    """A shell dies of it at once; SkyPilot signals the group, so that what the shell started hears of it too."""
    run = command(tmp_path)
    if where == "shell":
        run = ["bash", "-c", '"$@"; true', "bash", *run]
    with subprocess.Popen(run, env=clean_env(), start_new_session=True) as process:
        ranks = [tmp_path / f"rank{number}" for number in range(2)]
        wait_for(lambda: all(rank.exists() for rank in ranks))
        one, other = (psutil.Process(int(rank.read_text())) for rank in ranks)
        launcher = one.parent()
        assert launcher
        if where == "launcher":
            process.send_signal(signal.SIGTERM)
        elif where == "rank":
            other.terminate()
        else:
            os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == (-signal.SIGTERM if where == "shell" else 75)
    wait_for(lambda: not any(one.is_running() and one.status() != "zombie" for one in (launcher, one, other)))
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"]


def test_three_early_preemptions_do_not_end_a_healthy_run(tmp_path: Path) -> None:
    run = command(tmp_path, "--checkpoint-dir", tmp_path / "run", processes=1)
    env = clean_env(SKYPILOT_TASK_ID="sky-1")
    for _ in range(3):
        with subprocess.Popen(run, env=env) as process:
            wait_for((tmp_path / "rank0").exists)
            (tmp_path / "rank0").unlink()
            process.terminate()
            assert process.wait(60) == 75
        assert event(tmp_path / "run", "end")["cause"] == "signal"
    (tmp_path / "finish").touch()
    assert subprocess.run(run, env=env, timeout=60).returncode == 0


@pytest.mark.slow
def test_three_ranks_leave_within_10_s_of_the_fourths_kill_and_the_last_commit_stands(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    args = ["--dir", run.root, "--steps", 4000, "--samples", 16000, "--save-every", 4, "--slow", 0.02]
    words = [sys.executable, "-m", "trainer.launch", "--processes", 4, PROGRAMS / "faulty.py", *args]
    env = clean_env(OMP_NUM_THREADS="1")
    with warm.Popen([*map(str, words)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:

        def newest() -> int:
            return next((one.step for one in list_checkpoints(run) if is_committed(run.checkpoint(one))), 0)

        wait_for(newest)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [psutil.Process(int(pid)) for pid in children]  # In the order in which they were started.
        assert len(ranks) == 4
        before, struck = newest(), time.monotonic()
        ranks[2].kill()
        assert process.wait(60) == 75
        assert time.monotonic() - struck < 10
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)
    assert newest() >= before
    assert event(run.root, "end")["committed_step"] >= before
