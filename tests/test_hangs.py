"""A mount whose daemon does not answer: no call into it returns, and the attempt ends all the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import bucket_lab
import faultfs
import pytest
import warm
from bucket_lab import Mounted, mounted, until
from support import PROGRAMS, clean_env, mlp

from trainer.attempt.record import open_attempt, record
from trainer.bucket import deadlines
from trainer.bucket.hashing import hash_file
from trainer.bucket.verify import problem
from trainer.launch import rank as launched
from trainer.layout.documents import LayoutError
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_checkpoints

pytestmark = pytest.mark.skipif(bucket_lab.missing() is not None, reason=str(bucket_lab.missing()))
GRACE_S = 3.0


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounted]:
    with bucket_lab.store(tmp_path / "s3") as store, mounted(store, tmp_path / "m") as mount:
        yield mount


@pytest.fixture
def behind(tmp_path: Path) -> Path:
    """The run's folder in the store itself."""
    return tmp_path / "s3" / "store" / "bucket" / "run"


def begin(run_dir: Path, behind: Path, processes: int, *args: str) -> subprocess.Popen[str]:
    """An attempt that would go on for a while, with a checkpoint behind it."""
    command = [
        sys.executable, "-m", "trainer.launch", "--processes", str(processes), "--grace", str(GRACE_S),
        PROGRAMS / "faulty.py", "--dir", run_dir, "--grace", str(GRACE_S), "--steps", "2000", "--save-every", "5",
        "--slow", "0.02", *args,
    ]  # fmt: skip
    env = clean_env(OMP_NUM_THREADS="1")
    process = warm.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    # Behind the mount: in the mount a file is seen before it is uploaded.
    until("a checkpoint is in the store", lambda: is_whole(behind), 60)
    return process


def is_whole(run_dir: Path) -> bool:
    paths = RunPaths(run_dir)
    for name in list_checkpoints(paths):
        with suppress(LayoutError, OSError):  # It is just being written.
            if problem(paths.checkpoint(name), read_manifest(paths.checkpoint(name))) is None:
                return True
    return False


@pytest.mark.slow  # A daemon of its own that is frozen; those below hang on command.
@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_mount_and_a_sigterm_end_within_the_grace_and_nothing_holds_the_pipes(
    mount: Mounted, behind: Path, processes: int
) -> None:
    process = begin(mount.point / "run", behind, processes)
    mount.freeze()
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=GRACE_S + 30)  # To the end of its pipe, too.
    assert process.returncode == 75, output
    assert time.monotonic() - begun < GRACE_S + 10
    assert is_whole(behind)


@pytest.mark.slow  # A daemon of its own that is frozen; those below hang on command.
@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_mount_is_left_by_itself_for_a_new_machine(mount: Mounted, behind: Path, processes: int) -> None:
    process = begin(mount.point / "run", behind, processes, "--constant", "bucket.deadlines.LIMIT_S=2")
    mount.freeze()
    output, _ = process.communicate(timeout=GRACE_S + 30)
    assert process.returncode == 75, output
    assert "its mount hangs" in output
    assert is_whole(behind)


# -- a daemon that takes orders and does not answer: not even SIGKILL ends a process that waits for it -----------------


def hang_for_good(faults: faultfs.Client) -> None:
    for call in faultfs.CALLS:
        faults.hang(call, times=1000)


@pytest.mark.slow  # The launcher waits for 8 s after the grace; the two below see the same end.
@pytest.mark.parametrize("processes", [1, 2])
def test_a_mount_that_never_answers_and_a_sigterm_end_within_the_grace_and_nothing_holds_the_pipes(
    faults: faultfs.Client, tmp_path: Path, processes: int
) -> None:
    process = begin(faults.point / "run", tmp_path / "behind" / "run", processes)
    hang_for_good(faults)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=GRACE_S + 30)  # To the end of its pipe, too.
    assert process.returncode == 75, output
    assert is_whole(tmp_path / "behind" / "run")


def test_a_rank_that_dies_while_the_mount_never_answers_is_recorded_by_nobody_and_nothing_holds_the_pipes(
    faults: faultfs.Client, tmp_path: Path
) -> None:
    process = begin(faults.point / "run", tmp_path / "behind" / "run", 1)
    hang_for_good(faults)
    [rank] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(rank), signal.SIGKILL)
    output, _ = process.communicate(timeout=GRACE_S + 30)
    assert process.returncode == 75, output
    assert is_whole(tmp_path / "behind" / "run")


@pytest.mark.slow
def test_a_script_under_the_sidecar_ends_as_well(faults: faultfs.Client, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.launch", "--grace", str(GRACE_S), "--checkpoint-dir",
               faults.point / "run", tmp_path / "script.py"]  # fmt: skip
    (tmp_path / "script.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    process = warm.Popen(command, env=clean_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    hang_for_good(faults)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=GRACE_S + 30)
    assert process.returncode == 75, output


FINISHES = """\
import os, sys, threading, time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from trainer import SpotRun

folder, held, leave = sys.argv[1:]
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with SpotRun(folder) as run:
    run.register(model=model, optimizer=optimizer)
    for (x,) in run.steps(DataLoader(TensorDataset(torch.ones(4, 2))), until=2):
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss)
    run.finish()
file = os.open(held, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
threading.Thread(target=os.close, args=(file,), daemon=True).start()
while not Path(leave).exists():
    time.sleep(0.01)
"""


def test_a_finished_run_whose_last_file_closes_slowly_is_finished(faults: faultfs.Client, tmp_path: Path) -> None:
    """Its process is a zombie until then; it was not killed."""
    (tmp_path / "script.py").write_text(FINISHES)
    faults.hang("close", suffix=".csv")
    command = [sys.executable, "-m", "trainer.launch", tmp_path / "script.py", tmp_path / "run",
               faults.point / "log.csv", tmp_path / "leave"]  # fmt: skip
    process = warm.Popen(command, env=clean_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until("the file is being closed", lambda: faults.hits() or process.poll() is not None, 120)
    (tmp_path / "leave").touch()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


CLOSES = """\
import os, sys, threading, time
from pathlib import Path

held, leave = sys.argv[1:]
file = os.open(held, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
threading.Thread(target=os.close, args=(file,), daemon=True).start()
while not Path(leave).exists():
    time.sleep(0.01)
"""


def test_a_script_that_is_done_is_waited_for_while_its_last_file_closes(
    faults: faultfs.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain script, which reports no end. It was taken for killed after two seconds."""
    monkeypatch.setattr(launched, "ZOMBIE_S", 0.0)
    faults.hang("close", suffix=".csv")
    command = [sys.executable, "-c", CLOSES, faults.point / "log.csv", tmp_path / "leave"]
    process = subprocess.Popen(command)
    rank = launched.Rank(process, -1, -1)
    try:
        until("the file is being closed", lambda: faults.hits() or process.poll() is not None, 120)
        (tmp_path / "leave").touch()
        until("it has exited", lambda: launched.is_zombie(process.pid), 120)
        assert process.poll() is None
        assert not rank.stays_a_zombie()
        with monkeypatch.context() as late:
            late.setattr(launched, "CLOSING_S", 0.0)  # The mount is dead.
            assert rank.stays_a_zombie()
            assert rank.status_as_zombie() == -signal.SIGKILL
    finally:
        faults.clear()
        status = process.wait(120)
    assert status == 0


# -- a close after reading: FUSE asks the daemon then too --------------------------------------------------------------


@pytest.mark.slow  # The one below sees that the call is overdue.
def test_a_file_that_was_read_and_does_not_close_ends_the_attempt_that_restores(
    faults: faultfs.Client, tmp_path: Path
) -> None:
    assert mlp(faults.point / "run", "--fault", "kill@6", "--commit-first").code != 0
    faults.hang("close", after=1, suffix=".safetensors")  # After its header was read, and it was opened again.
    ended = mlp(faults.point / "run", "--constant", "bucket.deadlines.LIMIT_S=2")
    assert ended.code == 75, ended.output
    assert "its mount hangs" in ended.output
    assert faults.clear() == 1


def test_a_file_that_is_read_back_and_does_not_close_is_overdue(
    faults: faultfs.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the run's end would wait for its read-back for good."""
    monkeypatch.setattr(deadlines, "LIMIT_S", 0.2)
    path = faults.point / "a.bin"
    path.write_bytes(b"x" * 100)
    faults.hang("close", suffix=".bin")
    reading = threading.Thread(target=hash_file, args=(path,), daemon=True)
    reading.start()
    until("it is overdue", deadlines.overdue)
    faults.clear()
    reading.join(60)
    assert not reading.is_alive()
    assert deadlines.overdue() is None


# -- before the first step ---------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(tmp_path: Path) -> dict[str, str]:
    """An environment in which a call counts as hanging after four seconds."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "from trainer.attempt import history\nfrom trainer.bucket import deadlines, retry\n"
        "deadlines.LIMIT_S = retry.START_RETRY_S = history.RECORDS_S = 4.0\n"
    )
    return clean_env(PYTHONPATH=str(tmp_path / "site"))


@pytest.mark.slow  # Cold starts, and a limit that a busy machine keeps.
@pytest.mark.parametrize(
    ("call", "suffix"), [("write", "train.bin"), ("close", "held_out.bin"), ("create", "train.bin"), ("list", "tokens")]
)
def test_a_mount_that_hangs_while_data_is_prepared_is_left(
    faults: faultfs.Client, impatient: dict[str, str], call: str, suffix: str
) -> None:
    command = [sys.executable, "-m", "trainer", "--processes", "1", "--checkpoint-dir", faults.point / "run",
               "--max-steps", "2", "--warmup-steps", "1"]  # fmt: skip
    (faults.point / "run" / "tokens").mkdir(parents=True)
    faults.hang(call, suffix=suffix)
    done = warm.run(command, env=impatient, text=True, capture_output=True, timeout=150)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "its mount hangs" in done.stderr
    assert faults.clear() == 1
    again = warm.run(command, env=clean_env(OMP_NUM_THREADS="1"), text=True, capture_output=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr


@pytest.mark.slow  # A limit that a busy machine keeps.
@pytest.mark.parametrize(
    ("call", "suffix", "code"),
    [
        ("create", "-start.json", 1),  # Nothing is recorded: a new machine would not get any further.
        ("read", "-start.json", 75),
        ("list", "attempts", 1),
    ],
)
def test_a_mount_that_hangs_under_the_sidecar_is_left(
    faults: faultfs.Client, tmp_path: Path, impatient: dict[str, str], call: str, suffix: str, code: int
) -> None:
    (tmp_path / "script.py").write_text("print('done')\n")
    command = [sys.executable, "-m", "trainer.launch", "--checkpoint-dir", faults.point / "run", tmp_path / "script.py"]
    first = warm.run(command, env=impatient, text=True, capture_output=True, timeout=60)
    assert first.returncode == 0, first.stderr
    faults.hang(call, suffix=suffix)
    second = warm.run(command, env=impatient, text=True, capture_output=True, timeout=60)
    assert second.returncode == code, second.stderr
    assert second.stdout == ""
    assert "the bucket's mount hangs" in second.stderr
    assert faults.clear() == 1


@pytest.mark.slow
@pytest.mark.parametrize("why", ["stop-request", "no-progress"])
def test_a_mount_that_hangs_while_the_end_is_recorded_under_the_sidecar_is_left(
    faults: faultfs.Client, tmp_path: Path, why: str
) -> None:
    """The launcher knows the code by then: it does not wait for the record for good."""
    paths = RunPaths(faults.point / "run")
    if why == "stop-request":
        paths.stop("task").parent.mkdir(parents=True)
        paths.stop("task").touch()
    else:
        for _ in range(3):
            record(open_attempt(paths, launch="task", config={}, binding=None), "end", code=75)
    (tmp_path / "script.py").write_text("print('begun')\n")
    command = [sys.executable, "-m", "trainer.launch", "--checkpoint-dir", paths.root, tmp_path / "script.py"]
    faults.hang("create", suffix="-end.json")
    done = warm.run(command, env=clean_env(SKYPILOT_TASK_ID="task"), text=True, capture_output=True, timeout=60)
    assert done.returncode == {"stop-request": 79, "no-progress": 80}[why], done.stderr
    assert done.stdout == ""
    assert faults.hits() == 1
