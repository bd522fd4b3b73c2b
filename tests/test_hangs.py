"""A mount whose daemon does not answer: no call into it returns, and the attempt ends all the same."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import bucket_lab
import pytest
from bucket_lab import Mounted, mounted, until
from support import PROGRAMS, clean_env

from trainer.layout import LayoutError, RunPaths, list_checkpoints, read_manifest
from trainer.verify import problem

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
        PROGRAMS / "mlp.py", "--dir", run_dir, "--grace", str(GRACE_S), "--steps", "2000", "--save-every", "5",
        "--slow", "0.02", *args,
    ]  # fmt: skip
    env = clean_env(OMP_NUM_THREADS="1")
    process = subprocess.Popen(
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


@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_mount_and_a_sigterm_end_within_the_grace_and_nothing_holds_the_pipes(
    mount: Mounted, behind: Path, processes: int
) -> None:
    process = begin(mount.point / "run", behind, processes)
    mount.freeze()
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=GRACE_S + 10)  # To the end of its pipe, too.
    assert process.returncode == 75, output
    assert time.monotonic() - begun < GRACE_S + 10
    assert is_whole(behind)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_mount_is_left_by_itself_for_a_new_machine(mount: Mounted, behind: Path, processes: int) -> None:
    process = begin(mount.point / "run", behind, processes, "--constant", "patience.LIMIT_S=2")
    mount.freeze()
    output, _ = process.communicate(timeout=2 + GRACE_S + 10)
    assert process.returncode == 75, output
    assert "its mount hangs" in output
    assert is_whole(behind)
