"""The word that the machine will be taken, from a real signal or a real metadata service on loopback."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import warm
from clock import Clock
from metadata_servers import AwsServer
from support import PROGRAMS, assert_holds, clean_env, event

from trainer.attempt.ending import NOTICE, Leaving
from trainer.layout.events import read_progress
from trainer.layout.names import RunPaths, list_attempts, list_checkpoints
from trainer.notices.notice import Notice
from trainer.notices.presses import PRESSES, Presses
from trainer.notices.received import Notices, slurm_seconds_left
from trainer.ranks.agreement import Stop
from trainer.training.hangs import HangGuard
from trainer.training.participant import Participant
from trainer.training.taken_at import TakenAt


def test_a_second_signal_leaves_the_first_ones_deadline() -> None:
    code = (
        "import os, signal, time\nfrom trainer.notices.received import Notices\n"
        "n = Notices(10.0); n.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); first = n.first(); time.sleep(0.05)\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"
        "assert n.first() == first and n.first().kind == 'sigterm', n.first()\n"
    )
    subprocess.run([sys.executable, "-c", code], env=clean_env(), check=True)


def begin(
    run_dir: Path, server: AwsServer, *args: object, processes: int = 1, grace: float = 25
) -> subprocess.Popen[str]:
    return warm.Popen(
        [sys.executable, "-m", "trainer.launch", "--processes", str(processes), "--grace", str(grace),
         str(PROGRAMS / "faulty.py"), "--dir", str(run_dir), "--constant", "attempt.ending.HOLD_PAST_DEADLINE_S=1",
         *map(str, args)],
        env=clean_env(**server.env, SKYSPOT_NOTICE_POLL_S="0.05"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def test_a_noticed_attempt_saves_holds_and_is_followed_without_a_lost_step(tmp_path: Path) -> None:
    with AwsServer() as server:
        run_dir = tmp_path / "run"
        process = begin(run_dir, server, "--steps", 3000, "--save-every", 3000)
        with process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("step "):
                    server.announce(120)
                if "holding until this machine is taken" in line:
                    break
            assert_holds(process)
            ended, heard, began, saved = (event(run_dir, name) for name in ("end", "notice", "save-begin", "saved"))
            os.kill(process.pid, signal.SIGTERM)
            process.stdout.read()
        assert process.returncode == 75
    assert (ended["cause"], ended["code"]) == ("notice", 75)
    assert ended["committed_step"] == ended["step"] > 0
    assert heard["step"] == began["step"] == saved["step"] == ended["step"]
    assert heard["id"] == ended["notice"]["id"]
    assert 60 < heard["deadline"] - heard["heard"] <= 120.01
    assert heard["heard"] <= began["at"] <= saved["time"] <= ended["time"]
    assert ended["notice"]["kind"] == "aws-notice"  # type: ignore[index]
    assert len(list_attempts(RunPaths(run_dir))) == 1


def test_an_attempt_that_is_noticed_before_its_first_step_holds_too(tmp_path: Path) -> None:
    """It would only be followed by another on this machine, which would take the notice for an old one."""
    with AwsServer() as server:
        server.announce(120)
        process = begin(tmp_path / "run", server, "--prepare", 60)
        with process:
            assert process.stdout
            for line in process.stdout:
                if "holding until this machine is taken" in line:
                    break
            assert_holds(process)
            os.kill(process.pid, signal.SIGTERM)
            process.stdout.read()
    assert process.returncode == 75
    assert event(tmp_path / "run", "end")["cause"] == "notice"


@pytest.mark.slow
def test_a_machine_that_is_not_taken_after_all_is_left_with_75(tmp_path: Path) -> None:
    with AwsServer() as server:
        process = begin(tmp_path / "run", server, "--steps", 3000, "--save-every", 3000)
        with process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("step ") and not server.action:
                    server.announce(15)
            assert process.wait(90) == 75
            left_at = time.time()
    ended, heard = event(tmp_path / "run", "end"), event(tmp_path / "run", "notice")
    assert ended["cause"] == "notice"
    assert left_at >= heard["deadline"] > heard["heard"], "it holds until the machine is overdue"
    assert ended["committed_step"] == ended["step"]


IMPORTING = """
import os, signal, sys
from pathlib import Path
from trainer import RunConfig, SpotRun
assert "torch" not in sys.modules

class Taken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not run.notices.received.is_set():
            os.kill(os.getppid(), signal.SIGTERM)
            assert run.notices.received.wait(60)
            print("heard", flush=True)

sys.meta_path.insert(0, Taken())
run = SpotRun(RunConfig(checkpoint_dir=Path(sys.argv[1]), max_steps=1, global_batch_size=1, cpu=True))
with run:
    print("entered")
"""


@pytest.mark.slow
def test_a_sigterm_while_torch_is_imported_is_heard(tmp_path: Path) -> None:
    """A cold start: in a fork of the warm process there is nothing left to import."""
    (tmp_path / "script.py").write_text(IMPORTING)
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", "--grace", "100"]
    command += [tmp_path / "script.py", tmp_path / "run"]
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines() == ["notices: SIGTERM", "heard", "sigterm before the first step"]
    assert event(tmp_path / "run", "end")["cause"] == "signal"


# -- other signals, and hints ------------------------------------------------------------------------------------------

LOOP = """
import ctypes, sys, time
import torch
from torch.utils.data import DataLoader
from trainer import SpotRun

folder, manner = sys.argv[1:]
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), batch_size=1)
with SpotRun(folder, save_every=2) as run:
    run.register(model=model, optimizer=optimizer)
    for batch in run.steps(loader, until=64):
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if run.step == 5:
            while run.last_committed() != 4:
                time.sleep(0.01)
            print("stuck", flush=True)
            if manner == "in Python":
                time.sleep(3600)
            mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
            lock(mutex)
            lock(mutex)  # For ever, and no signal ends it.
"""


@pytest.mark.parametrize("manner", ["in Python", "in C"])
def test_ctrl_c_three_times_leaves_at_once_and_names_the_last_commit(tmp_path: Path, manner: str) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", "--grace", "3600"]
    command += [str(tmp_path / "loop.py"), str(tmp_path / "run"), manner]
    with warm.Popen(command, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line == "stuck\n":
                break
        for _ in range(3):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.1)  # Two signals of one number that come together are one.
        rest = process.stdout.read()
        assert process.wait(60) == 75
    assert "Ctrl-C 3 times: leaving at once. The last committed step is 4." in rest
    assert (event(tmp_path / "run", "end")["cause"], event(tmp_path / "run", "end")["code"]) == ("signal", 75)


def test_only_presses_within_two_seconds_count_together(clock: Clock) -> None:
    presses, counts = Presses(), []
    for pause in (0, 1.5, 1.5, 0.4, 2.1):
        clock.added += pause
        counts.append(presses.count())
    assert (counts, PRESSES) == ([1, 2, 2, 3, 1], 3)


def test_sigusr1_saves_and_leaves_as_sigterm_does(tmp_path: Path) -> None:
    """Slurm sends it before the time limit: `--signal=USR1@120`."""
    with AwsServer() as server:
        process = begin(tmp_path / "run", server, "--steps", 3000, "--save-every", 3000)
        with process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("step "):
                    os.kill(process.pid, signal.SIGUSR1)
                    break
            rest = process.stdout.read()
        assert process.returncode == 75, rest
    ended = event(tmp_path / "run", "end")
    assert ended["cause"] == "signal"
    assert ended["committed_step"] == ended["step"]
    assert ended["notice"]["kind"] == "sigusr1"  # type: ignore[index]


def test_slurm_says_how_long_is_left_before_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_seconds_left() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert 90 < (slurm_seconds_left() or 0) <= 100


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_hint_saves_once_more_and_training_goes_on(tmp_path: Path, processes: int) -> None:
    paths = RunPaths(tmp_path / "run")
    with AwsServer() as server:
        server.rebalance = '{"noticeTime": "2026-11-05T08:22:00Z"}'
        process = begin(paths.root, server, "--steps", 4000, "--samples", 8000, "--save-every", 4000, "--slow", 0.01,
                        processes=processes)  # fmt: skip
        with process:
            end = time.monotonic() + 120
            while not list_checkpoints(paths):
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.02)
            saved = list_checkpoints(paths)[-1].step
            seen = read_progress(paths, list_attempts(paths)[-1]).get("step", 0)
            while read_progress(paths, list_attempts(paths)[-1]).get("step", 0) <= seen:
                assert time.monotonic() < end
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGTERM)
            output = process.communicate()[0]
    assert process.returncode == 75, output
    assert "aws expects to take this machine" in output
    ended = event(paths.root, "end")
    assert 0 < saved < int(str(ended["step"]))
    assert [name.step for name in list_checkpoints(paths)] == [ended["step"], saved], "once"
    assert ended["committed_step"] == ended["step"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "processes"), [("notice", 1), ("sigterm", 2)])
def test_a_sigterm_beside_a_notice_changes_neither_deadline_nor_save(tmp_path, first: str, processes: int) -> None:
    """The save takes longer than the grace, and not longer than the notice."""
    with AwsServer() as server:
        process = begin(tmp_path / "run", server, "--steps", 3000, "--save-every", 3000, "--slow-save", 9, grace=5,
                        processes=processes)  # fmt: skip
        with process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("step "):
                    break
            if first == "sigterm":
                os.kill(process.pid, signal.SIGTERM)
            else:
                server.announce(60)
            for line in process.stdout:
                if "saving step" in line:
                    break
            if first == "sigterm":
                server.announce(60)
            else:
                os.kill(process.pid, signal.SIGTERM)
            rest = []
            for line in process.stdout:
                rest.append(line)
                if "holding until this machine is taken" in line:
                    break
            assert_holds(process)
            os.kill(process.pid, signal.SIGTERM)
            rest += process.stdout.readlines()
        assert process.returncode == 75, rest
    ended = event(tmp_path / "run", "end")
    assert ended["cause"] == "notice", rest
    assert ended["committed_step"] == ended["step"]


class Store:
    """The messages of ranks that run in this process."""

    def __init__(self) -> None:
        self.world_size, self.unsupervised, self.messages = 2, False, {}

    def post_message(self, key: str, text: str) -> None:
        self.messages[key] = text or "-"

    def read_message(self, key: str, seconds: float = 0.0) -> str | None:
        return self.messages.get(key)


def one_of_two(store: Store, rank: int, *notices: Notice) -> Participant:
    """A rank that a launcher of ours watches, and that has heard of these notices."""
    found = Participant.__new__(Participant)
    found.rank, found.group, found.attempt = rank, store, None  # type: ignore[assignment]
    found.notices, found.peer_gone, found.hangs = Notices(25.0), threading.Event(), HangGuard(0.0, lambda seconds: None)
    found.notices._notices = list(notices)
    found.final_is_whole, found._look_at_store, found._taken_at = False, 0.0, TakenAt()
    found.tracking = None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("word", ["SIGTERM", "aws-notice"])
def test_a_stop_loads_no_module(tmp_path: Path, word: str) -> None:
    """A file system that is about to go may not answer. A cold start: a warm one has loaded everything."""
    with AwsServer() as server:
        command = [sys.executable, "-m", "trainer.launch", "--processes", "1", PROGRAMS / "stop_imports.py"]
        env = clean_env(**server.env, SKYSPOT_NOTICE_POLL_S="0.05") if word == "aws-notice" else clean_env()
        process = subprocess.Popen(
            [*map(str, command), str(tmp_path / "run"), str(tmp_path / "late")], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with process:
            assert process.stdout
            for line in process.stdout:
                if line == "now\n" and word == "SIGTERM":
                    process.terminate()
                elif line == "now\n":
                    server.announce(120)
                elif "holding until this machine is taken" in line:
                    process.terminate()
    assert process.returncode == 75
    ended = event(tmp_path / "run", "end")
    assert ended["committed_step"] == ended["step"]
    assert dict(ended["notice"])["kind"] == word.lower()  # type: ignore[call-overload]
    assert (tmp_path / "late").read_text() == ""


def heard(kind: str, seconds_left: float) -> Notice:
    return Notice(kind, kind, time.monotonic(), seconds_left)


def test_only_a_signal_that_comes_during_the_hold_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 may begin to hold after the signal: rank 0 ends its hold, too."""
    store = Store()
    first, second = (one_of_two(store, rank, heard("aws-notice", 120)) for rank in range(2))
    beside: list[bool] = []

    def printed(text: str) -> None:
        beside.append(first.notices.signalled.is_set())
        first.notices.signalled.set()

    monkeypatch.setattr(first, "print_line", printed)
    begun = time.monotonic()
    for one in (first, second):
        one.notices.signalled.set()
        one.hold(600, NOTICE)
    assert beside == [False]
    assert time.monotonic() - begun < 300


@pytest.mark.parametrize("clouds_s", [20, 120])
def test_a_clouds_notice_after_a_signal_counts_on_every_rank_be_it_shorter_or_longer(clouds_s: float) -> None:
    store, stop = Store(), Stop("sigterm", time.monotonic() + 25, time.monotonic())
    sigterm = heard("sigterm", 25)
    first, second = one_of_two(store, 0, sigterm), one_of_two(store, 1, sigterm)
    assert first.deadline(stop) == second.deadline(stop) == stop.deadline
    notice = heard("aws-notice", clouds_s)
    first.notices._take_in(notice)
    assert first.deadline(stop) == notice.deadline
    assert notice.deadline - 0.01 <= second.deadline(stop) <= time.monotonic() + clouds_s
    again = second.deadline(stop)
    later, earlier = heard("gcp-notice", 300), heard("azure-notice", 0)
    second.notices._take_in(later)
    assert second.deadline(stop) == again
    second.notices._take_in(earlier)
    assert second.deadline(stop) == earlier.deadline
    assert earlier.deadline - 0.01 <= first.deadline(stop) <= time.monotonic()


@pytest.mark.parametrize("signal_too", [False, True])
def test_before_the_first_step_all_ranks_hold_where_one_hears_of_a_notice(signal_too: bool) -> None:
    """A rank that waits for one that holds would give up at its time-out, and end the hold."""
    store = Store()
    with pytest.raises(Leaving) as first:
        one_of_two(store, 0, heard("aws-notice", 120)).check_stop()
    with pytest.raises(Leaving) as second:
        one_of_two(store, 1, *[heard("sigterm", 25)] * signal_too).check_stop()
    assert first.value.ending is second.value.ending is NOTICE
    assert second.value.hold_s == first.value.hold_s > 0
