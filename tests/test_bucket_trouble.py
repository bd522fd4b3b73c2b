"""Saves into a store that refuses: tried again, given up, or the end of the attempt."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import bucket_lab
import faultfs
import pytest
import warm
from bucket_lab import until
from support import PROGRAMS, clean_env, event, mlp

from trainer.bucket.verify import problem
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_checkpoints

pytestmark = pytest.mark.skipif(bucket_lab.missing() is not None, reason=str(bucket_lab.missing()))
SHARE = "share-00000.safetensors"


def begin(run_dir: Path, *args: str, grace_s: float = 5) -> subprocess.Popen[str]:
    """An attempt with a committed checkpoint, and more to come."""
    process = warm.Popen(
        [sys.executable, "-m", "trainer.launch", "--grace", str(grace_s), PROGRAMS / "faulty.py", "--dir", run_dir,
         "--slow", "0.01", "--save-every", "5", "--constant", "checkpoint.commit.FIRST_RETRY_S=0.01", *args],
        env=clean_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    until("a checkpoint is committed", lambda: any((run_dir / "checkpoints").glob("*/MANIFEST.json")), 60)
    return process


def newest_is_whole(run_dir: Path) -> bool:
    paths = RunPaths(run_dir)
    committed = [name for name in list_checkpoints(paths) if (paths.checkpoint(name) / "MANIFEST.json").exists()]
    return problem(paths.checkpoint(committed[0]), read_manifest(paths.checkpoint(committed[0]))) is None


@pytest.mark.parametrize(
    ("call", "number", "code", "words"),
    [
        ("create", errno.EROFS, 1, "Give this machine permission to write there"),
        ("write", errno.ENOTCONN, 75, "Transport endpoint is not connected"),
        ("close", errno.EIO, 1, "2 saves in a row failed"),
    ],
)
def test_a_store_that_refuses_for_good_ends_the_attempt(
    faults: faultfs.Client, tmp_path: Path, call: str, number: int, code: int, words: str
) -> None:
    process = begin(faults.point / "run", "--steps", "3000", "--save-failures", "2")
    faults.fail(call, number, times=1000, suffix=SHARE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert words in output
    assert newest_is_whole(tmp_path / "behind" / "run")
    assert event(tmp_path / "behind" / "run", "end")["code"] == code


def test_a_write_that_fails_for_a_moment_costs_no_checkpoint(faults: faultfs.Client, tmp_path: Path) -> None:
    faults.fail("close", errno.EIO, suffix=SHARE)
    process = begin(faults.point / "run", "--steps", "40", "--save-every", "3", "--keep-latest", "2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert faults.clear() == 1
    assert "could not be written: " in output
    assert "trying again in" in output
    assert newest_is_whole(tmp_path / "behind" / "run")
    # Nothing shows what a mount of an unknown kind has stored: all is kept, and said at the tenth save.
    assert "Keeping 10 checkpoints (" in output
    assert "a mount of this kind (fuse.faultfs) does not show what it has uploaded" in output
    steps = {name.step for name in list_checkpoints(RunPaths(tmp_path / "behind" / "run"))}
    assert steps >= set(range(3, 40, 3))


def test_a_second_of_trouble_at_a_stop_does_not_cost_the_last_boundary(faults: faultfs.Client, tmp_path: Path) -> None:
    process = begin(faults.point / "run", "--steps", "3000", grace_s=25)
    faults.fail("create", errno.EIO, times=25, suffix=SHARE)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert faults.clear() >= 20, output
    ended = event(tmp_path / "behind" / "run", "end")
    assert ended["committed_step"] == ended["step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "options", "code"),
    [
        (8, (), 0),  # More than one save bears; the next one is made.
        (10_000, (), 1),
        (10_000, ("--fault", "sigterm@9", "--grace", "2"), 75),  # A stop in the last step, and nothing can be saved.
    ],
)
def test_the_last_save_bears_as_much_as_any_other(
    faults: faultfs.Client, tmp_path: Path, trouble: int, options: tuple[str, ...], code: int
) -> None:
    faults.fail("create", errno.EIO, times=trouble, suffix=SHARE)
    options = ("--constant", "checkpoint.commit.FIRST_RETRY_S=0.01", *options)
    ended = mlp(faults.point / "run", "--steps", 10, "--save-every", 100, *options, grace=5)
    assert ended.code == code, ended.output
    assert event(tmp_path / "behind" / "run", "end")["code"] == code


def test_saves_that_take_longer_than_their_interval_are_said(tmp_path: Path) -> None:
    """The first save goes on while training waits for it, however fast either is."""
    command = [sys.executable, PROGRAMS / "faulty.py", "--dir", tmp_path / "run", "--outlast", "0.2", "--steps", "7",
               "--save-every", "3", "--constant", "training.session.REPORTED_WAIT_S=0.1"]  # fmt: skip
    done = warm.run(command, env=clean_env(OMP_NUM_THREADS="1"), text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("longer than the save interval (3 steps); training stalled for") == 1
