"""Temporary folders: gone however their process ends, and the right disk is blamed where one is full."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import clean_env

from trainer import RunConfig, SpotRun
from trainer.bucket.retry import retry
from trainer.errors import AttemptError
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.names import RunPaths
from trainer.machine import scratch

HOLDER = """
import os, signal, sys
from pathlib import Path
from trainer.machine import scratch
with scratch.folder("tokens") as made:
    (made / "packed").write_bytes(b"0" * 1000)
    print("made", flush=True)
    {then}
"""
LEAVE = """
    from trainer.training.config import RunConfig
    from trainer.attempt.ending import PEER_GONE
    from trainer.training.run import SpotRun
    SpotRun(RunConfig(checkpoint_dir=Path("/nowhere"), max_steps=1)).leave(PEER_GONE)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one place where temporary folders may go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(scratch, "places", lambda: [folder])
    return folder


def start(temporary: Path, then: str) -> subprocess.Popen[str]:
    env = clean_env(TMPDIR=str(temporary))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(then=then)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stdout
    assert process.stdout.readline() == "made\n"
    return process


def test_a_folder_is_gone_when_its_process_leaves_the_trainer(temporary: Path) -> None:
    process = start(temporary, LEAVE.strip())
    process.communicate()
    assert process.returncode == EXIT_PREEMPTED
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_has_is_not(temporary: Path) -> None:
    killed, living = (start(temporary, "sys.stdin.read()") for _ in range(2))
    (temporary / "skyspot-mine").mkdir()  # Not made by the trainer: it carries no mark.
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(temporary.iterdir())) == 3
    with scratch.folder("final") as made:
        assert len(list(temporary.iterdir())) == 3
        assert list(made.iterdir()) == []
    assert len(list(temporary.iterdir())) == 2
    living.communicate("")
    assert [path.name for path in temporary.iterdir()] == ["skyspot-mine"]


def test_what_is_not_made_by_the_trainer_on_this_machine_stays(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a folder of the user's, nor one of a machine whose locks a shared file system does not show here."""
    with monkeypatch.context() as there:
        there.setattr(socket, "gethostname", lambda: "another")
        theirs = scratch._locked(temporary, "skyspot-tokens-")
    os.close(scratch._mine.pop(theirs.parent))
    users = temporary / "skyspot-project"
    users.mkdir()
    for name in (".lock", "paper.txt"):
        (users / name).touch()
    mine = scratch._locked(temporary, "skyspot-tokens-")
    os.close(scratch._mine.pop(mine.parent))
    scratch.remove_stale()
    assert theirs.is_dir()
    assert (users / "paper.txt").exists()
    assert not mine.exists()


@pytest.mark.parametrize(("module", "call", "code"), [(fcntl, "flock", errno.ENOSYS), (os, "write", errno.ENOSPC)])
def test_a_file_system_without_locks_or_room_has_temporary_folders_all_the_same(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, module: object, call: str, code: int
) -> None:
    """The exported model is streamed past it: the folder may be all that is needed."""

    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, call, fails)
    with scratch.folder("tokens") as made:
        scratch.remove_stale()
        assert made.is_dir()
    assert not list(temporary.iterdir())


def of_size(free: int) -> Callable[[object], object]:
    return lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_favail=1, f_files=1)


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_the_disk_that_is_full_is_blamed(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    paths = RunPaths(tmp_path / "run")
    monkeypatch.setattr(os, "statvfs", of_size(free))
    monkeypatch.setattr(scratch, "_on_one_disk", lambda one, other: False)

    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # A write names no file.

    with pytest.raises((AttemptError, scratch.ScratchError), match="No space left on device") as raised:
        retry(paths, write)
    blamed = paths.root if free else temporary
    assert str(raised.value).startswith(f"{blamed}: ")


def test_an_error_that_says_only_that_a_disk_is_full_is_told_with_the_disk(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SpotRun(RunConfig(checkpoint_dir=tmp_path / "run", max_steps=1))
    monkeypatch.setattr(os, "statvfs", of_size(0))
    monkeypatch.setattr(scratch, "_on_one_disk", lambda one, other: False)
    assert run._remedy(OSError(errno.ENOSPC, "No space left on device")) == f"{temporary} is full. "
    assert run._remedy(OSError(errno.ENOSPC, "No space left on device", "/mine")) == ""
    assert run._remedy(OSError(errno.EIO, "Input/output error")) == ""
    assert run._remedy(ValueError("no space")) == ""


def test_who_writes_to_a_local_disk_says_so(temporary: Path, tmp_path: Path) -> None:
    def write() -> None:
        with scratch.local(temporary):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.raises(scratch.ScratchError, match="set TMPDIR to a folder with room") as raised:
        retry(RunPaths(tmp_path / "run"), write)
    assert str(raised.value).startswith(f"{temporary}: ")
    assert raised.value.code == EXIT_PREEMPTED
