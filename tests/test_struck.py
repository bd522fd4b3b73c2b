"""Where a signal falls: on the launcher, one rank, their process group, or a shell in front of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stop.append(signal.Signals(number).name))
with open(folder + "/rank" + rank + ".new", "w") as file:
    file.write(str(os.getpid()))
os.replace(folder + "/rank" + rank + ".new", folder + "/rank" + rank)
while not stop and not os.path.exists(folder + "/finish"):
    time.sleep(0.01)
if stop:
    with open(folder + "/saved" + rank, "w") as file:
        file.write(" ".join(stop))
    sys.exit(int(os.environ.get("CODE", 75)))
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


@pytest.fixture(autouse=True)
def heed_sighup() -> Iterator[None]:
    """The tests may themselves run under nohup, and children inherit what is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Makes stdin the terminal of the session, and becomes another program."""


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *(("SIGTERM", where) for where in ("launcher", "rank", "group", "shell", "tree")),
        *(("SIGHUP", where) for where in ("launcher", "tree", "terminal")),
        ("SIGUSR1", "launcher"),
    ],
)
def test_every_rank_saves_and_none_is_left_wherever_a_signal_falls(tmp_path: Path, name: str, where: str) -> None:
    """A shell dies of it at once; SkyPilot signals the group, so that what the shell started hears of it too."""
    number, is_recorded = signal.Signals[name], where == "tree" or name == "SIGUSR1"
    run = command(tmp_path, *(["--checkpoint-dir", tmp_path / "run"] if is_recorded else []))
    if where == "shell":
        run = ["bash", "-c", '"$@"; true', "bash", *run]
    streams = {}
    if where == "terminal":
        ours, its = os.openpty()
        run = [sys.executable, "-c", IN_TERMINAL, *run]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    with subprocess.Popen(run, env=clean_env(), start_new_session=True, **streams) as process:
        ranks = [tmp_path / f"rank{number}" for number in range(2)]
        wait_for(lambda: all(rank.exists() for rank in ranks))
        one, other = (psutil.Process(int(rank.read_text())) for rank in ranks)
        launcher = one.parent()
        assert launcher
        if where == "launcher":
            process.send_signal(number)
        elif where == "rank":
            other.terminate()
        elif where == "tree":
            children = launcher.children()  # The ranks, and the sidecar.
            assert len(children) == 3
            # Ranks may not die of a SIGHUP before the launcher has passed it on; at a SIGTERM they leave by themselves.
            for every in (*children, launcher) if name == "SIGHUP" else (launcher, *children):
                with suppress(psutil.NoSuchProcess):
                    every.send_signal(number)
        elif where == "terminal":
            os.close(its)
            os.close(ours)
        else:
            os.killpg(process.pid, number)
        assert process.wait(60) == (-signal.SIGTERM if where == "shell" else 75)
    wait_for(lambda: not any(one.is_running() and one.status() != "zombie" for one in (launcher, one, other)))
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"]
    if is_recorded:
        assert (event(tmp_path / "run", "end")["cause"], event(tmp_path / "run", "end")["code"]) == ("signal", 75)


def test_a_closed_terminal_changes_nothing_under_nohup_and_a_failure_after_sigusr1_is_the_scripts_own(
    tmp_path: Path,
) -> None:
    streams = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)  # Else nohup may write a file.
    run = ["nohup", *command(tmp_path, "--checkpoint-dir", tmp_path / "run", processes=1)]
    with subprocess.Popen(run, env=clean_env(CODE="1"), **streams) as process:
        wait_for((tmp_path / "rank0").exists)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 1
    assert (tmp_path / "saved0").read_text() == "SIGUSR1"
    assert event(tmp_path / "run", "end")["cause"] == "died"


OPENS_LATER = """
import os, select, sys
if "trainer.launch.sidecar" in sys.orig_argv:
    open(os.environ["OPENING"], "w").close()
    select.select([0], [], [])
"""


def test_a_signal_while_the_attempt_is_opened_starts_no_rank(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OPENS_LATER)
    path = os.pathsep.join([str(tmp_path / "site"), clean_env()["PYTHONPATH"]])
    env = clean_env(PYTHONPATH=path, OPENING=str(tmp_path / "opening"))
    run = command(tmp_path, "--checkpoint-dir", tmp_path / "run", processes=1)
    with subprocess.Popen(run, env=env) as process:
        wait_for((tmp_path / "opening").exists)
        process.send_signal(signal.SIGUSR1)
        try:
            assert process.wait(60) == 75
        finally:
            process.kill()
    assert not (tmp_path / "rank0").exists()
    assert event(tmp_path / "run", "end")["cause"] == "signal"


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
        before, struck = newest(), time.time()
        ranks[2].kill()
        assert process.wait(60) == 75
    assert not any(rank.is_running() and rank.status() != "zombie" for rank in ranks)
    assert newest() >= before
    ended = event(run.root, "end")
    assert ended["cause"] == "peer-gone"
    assert ended["committed_step"] >= before
    assert ended["time"] - struck < 10
