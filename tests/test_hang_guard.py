"""Training that stands still: found, kept for its author as the stacks of all threads, and left for another machine."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import warm
from support import clean_env, event
from test_nodes import environment

from trainer.layout.names import RunPaths, list_attempts
from trainer.training import hangs
from trainer.training.hangs import HangGuard

LOOP = """
import sys, time
import torch
from torch.utils.data import DataLoader
from trainer import SpotRun

def the_step_that_hangs():
    while run.last_committed() != 4:
        time.sleep(0.01)
    time.sleep(3600)

torch.manual_seed(0)
with SpotRun(sys.argv[1], save_every=2, hang_timeout=1) as run:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.register(model=model, optimizer=optimizer)
    loader = DataLoader(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), batch_size=1)
    for batch in run.steps(loader, until=64):
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if run.step == 5 and run.rank == run.world_size - 1:
            the_step_that_hangs()
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_hang_is_left_with_75_and_the_stacks_of_every_rank(tmp_path: Path, processes: int) -> None:
    """With two processes one hangs, and the other waits for it in a collective."""
    (tmp_path / "loop.py").write_text(LOOP)
    command = [sys.executable, "-m", "trainer.launch", "--processes", str(processes), str(tmp_path / "loop.py")]
    done = warm.run(
        [*command, str(tmp_path / "run")],
        env=clean_env(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 75, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("Error:"))
    assert "training has stood still for" in line
    assert "The last committed step is 4." in line
    assert done.stderr.count("stood still") == 1
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["code"], ended["committed_step"]) == ("hang", 75, 4)
    paths = RunPaths(tmp_path / "run")
    name = list_attempts(paths)[-1]
    stacks = [paths.stacks(name, rank).read_text() for rank in range(processes)]
    assert "the_step_that_hangs" in stacks[-1]
    assert all("loop.py" in text for text in stacks)


GIVEN_UP = """
import dataclasses, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader
from trainer import SpotRun

folder, still = sys.argv[1], int(sys.argv[2])
stands_still = Path(folder + "-still")

def the_step_that_hangs():
    stands_still.touch()
    time.sleep(3600)

torch.manual_seed(0)
with SpotRun(folder, save_every=2) as run:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.register(model=model, optimizer=optimizer)
    loader = DataLoader(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), batch_size=1)
    for batch in run.steps(loader, until=64):
        model(batch).sum().backward()
        if run.step == 5:
            while run.last_committed() != 4:
                time.sleep(0.01)
            distributed_c10d._set_pg_timeout(timedelta(seconds=2), run.group._control)
            run.config = dataclasses.replace(run.config, peer_timeout_s=2.0)
            if run.rank == still:
                the_step_that_hangs()
            while not stands_still.exists():
                time.sleep(0.01)
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.slow
@pytest.mark.parametrize("still", [0, 1])
def test_a_rank_that_others_give_up_first_keeps_its_stacks_too(tmp_path: Path, still: int) -> None:
    """With the defaults: --hang-timeout is longer than --peer-timeout, which is short here from step 6 on."""
    (tmp_path / "loop.py").write_text(GIVEN_UP)
    command = [sys.executable, "-m", "trainer.launch", "--processes", "2", str(tmp_path / "loop.py")]
    done = warm.run(
        [*command, str(tmp_path / "run"), str(still)],
        env=clean_env(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 75, done.stderr
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["code"], ended["committed_step"]) == ("peer-gone", 75, 4)
    paths = RunPaths(tmp_path / "run")
    name = list_attempts(paths)[-1]
    assert "the_step_that_hangs" in paths.stacks(name, still).read_text()
    waited = paths.stacks(name, 1 - still).read_text()
    assert "PeerGoneError" in waited
    assert "loop.py" in waited.partition("PeerGoneError")[2], "where it waited"
    [line] = [line for line in done.stderr.splitlines() if "stood still" in line]
    assert f"{paths.stacks(name, 1 - still)}, one file for each rank. The last committed step is 4." in line


@pytest.mark.slow
@pytest.mark.parametrize("still", [0, 1])
def test_a_rank_on_another_machine_keeps_its_stacks_and_leaves_with_the_others(tmp_path: Path, still: int) -> None:
    """Once a machine has left, SkyPilot would kill the one that hangs, which no launcher of ours watches."""
    (tmp_path / "loop.py").write_text(GIVEN_UP)
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", str(tmp_path / "loop.py")]
    task = f"sky-managed-{secrets.token_hex(4)}_hang_1-0"
    launchers = [
        warm.Popen(
            [*command, str(tmp_path / "run"), str(still)],
            env=environment(tmp_path / f"home-{node}", node, task),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for node in range(2)
    ]
    try:
        said = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [75, 75], said
    ended = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["code"], ended["committed_step"]) == ("peer-gone", 75, 4)
    paths = RunPaths(tmp_path / "run")
    name = list_attempts(paths)[-1]
    assert "the_step_that_hangs" in paths.stacks(name, still).read_text()
    assert "PeerGoneError" in paths.stacks(name, 1 - still).read_text()


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> tuple[HangGuard, threading.Event]:
    monkeypatch.setattr(hangs, "LOOK_S", 0.01)
    found = threading.Event()
    return HangGuard(0.1, lambda _: found.set()), found


def test_nothing_is_watched_before_the_first_step_has_ended_and_at_rest(guard) -> None:
    watched, found = guard
    watched.beat()
    assert not found.wait(0.4)
    watched.begin()
    watched.rest()
    watched.beat()
    assert not found.wait(0.4)
    watched.begin()
    assert found.wait(30)


def test_training_may_stand_still_as_long_as_it_has_before(guard) -> None:
    watched, found = guard
    watched.beat()
    assert watched._first_at
    watched._first_at -= 3600.0  # A first step of an hour.
    watched.begin()
    assert not found.wait(0.4)
    watched.begin()
    assert watched._longest_s < 7200
    watched.end()


def test_how_long_training_has_stood_still_is_known_from_the_first_step_on() -> None:
    watched = HangGuard(0.0, lambda _: None)
    assert watched.still_s == 0.0
    watched.beat()
    assert watched._first_at
    watched._first_at -= 100.0
    assert watched.still_s >= 100
    watched.begin()
    assert watched.still_s < 100
    watched.rest()
    assert watched.still_s == 0.0


def test_a_limit_of_0_watches_nothing() -> None:
    watched = HangGuard(0.0, lambda _: None)
    watched.begin()
    assert watched._thread is None


STOPPED = """
import sys, threading, time
from trainer.training import hangs
hangs.LOOK_S = 0.01
guard = hangs.HangGuard(1.0, lambda seconds: print("hang", flush=True))
guard.begin()
print("begun", flush=True)
sys.stdin.readline()
guard.beat()
guard.end()
print("over", flush=True)
"""


def test_a_process_that_was_itself_stopped_has_not_hung() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED], env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)  # Longer than the limit: that is what is tested.
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.read() == "over\n"
