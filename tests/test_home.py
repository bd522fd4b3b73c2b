"""No home folder, or one that cannot be written: everything else goes on."""

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from needs import needs_root
from support import REPO, clean_env, event

from trainer.machine import home
from trainer.machine.home import setup_seconds
from trainer.machine.token import machine_token

NOBODY = 54321


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No HOME, no passwd entry; the folder for temporary files."""

    def no_entry(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", *home._CACHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_without_a_home_folder_a_temporary_one_stands_in(nobody: Path) -> None:
    assert home.home() is None
    token = machine_token()
    stand_in = nobody / f"skyspot-of-{os.getuid()}"
    assert (stand_in / "machine").read_text() == token == machine_token()
    assert stand_in.stat().st_mode & 0o777 == 0o700
    assert setup_seconds() is None
    found, note = home.substitutes()
    assert found == {"HOME": str(stand_in), "USER": f"user-{os.getuid()}"}
    assert note == f"HOME is not set, and this user has no passwd entry: caches go to {stand_in}"


@pytest.mark.parametrize("place", ["file", "file/below", "absent/below"])
def test_a_home_that_is_no_folder_counts_as_none(
    nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / place))
    made = place.startswith("absent")
    assert home.home() == (tmp_path / place if made else None)
    found, note = home.substitutes()
    assert ("HOME" in found, bool(note)) == (not made, not made)
    assert home.cache() == (tmp_path / place / ".cache" / "skyspot" if made else nobody / f"skyspot-of-{os.getuid()}")


def test_a_folder_of_that_name_that_is_somebody_elses_is_left_alone(nobody: Path, tmp_path: Path) -> None:
    (tmp_path / "trap").mkdir()
    (nobody / f"skyspot-of-{os.getuid()}").symlink_to(tmp_path / "trap")
    assert home.cache() is None
    assert home.substitutes()[0].keys() == {"USER"}
    assert len(machine_token()) == 16
    assert list((tmp_path / "trap").iterdir()) == []


def test_a_home_that_is_there_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "somebody")
    assert home.substitutes() == ({}, "")
    assert home.cache() == tmp_path / ".cache" / "skyspot"


def as_nobody(*command: object, **env: str | None) -> subprocess.CompletedProcess[str]:
    """Run a command as a user whom nobody knows."""
    if subprocess.run(["unshare", f"--map-user={NOBODY}", "true"], capture_output=True).returncode:
        pytest.skip(needs_root("a HOME that nobody may write"))
    clean = {**clean_env(), **env}
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        if not env.get(name):
            clean.pop(name, None)
    return subprocess.run(
        ["unshare", f"--map-user={NOBODY}", f"--map-group={NOBODY}", *map(str, command)],
        env=clean, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, pytest.param("/sys", marks=pytest.mark.slow)], ids=["none", "read-only"])
def test_a_run_without_a_home_folder_that_can_be_written_trains(tmp_path: Path, where: str | None) -> None:
    """Existing, it was a traceback, or ten minutes of asking again for a folder that could not be made.

    Started cold: torch looks for the home folder while it is imported.
    """
    (tmp_path / "tmp").mkdir()
    (tmp_path / "text.txt").write_text("some text\n" * 200)
    done = as_nobody(
        sys.executable, "-m", "trainer", "--processes", 1, "--max-steps", 2, "--checkpoint-dir", tmp_path / "run",
        "--data", tmp_path / "text.txt", "--seq-len", 32, HOME=where, TMPDIR=str(tmp_path / "tmp"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stand_in = tmp_path / "tmp" / f"skyspot-of-{NOBODY}"
    why = f"{where} cannot be written" if where else "HOME is not set, and this user has no passwd entry"
    assert done.stderr == f"{why}: caches go to {stand_in}\n"
    [token] = stand_in.rglob("machine")
    assert event(tmp_path / "run", "start")["machine"] == token.read_text()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["queue"], "set HOME and USER, which SkyPilot needs"),
        (["checkpoints", "list", "r2://bucket/run"], "r2:// needs SkyPilot's files ~/.cloudflare/accountid"),
        (["rehearse", "task.yaml", "--mount", "/data=~/data"], "~/data"),
    ],
)
def test_the_command_line_says_in_a_line_what_it_cannot_do_without_a_home_folder(
    tmp_path: Path, command: list[str], said: str
) -> None:
    (tmp_path / "task.yaml").write_text("file_mounts: {/data: s3://corpus}\nrun: echo\n")
    line = f"cd {tmp_path} && exec {sys.executable} -m skyspot {' '.join(command)}"
    done = as_nobody("sh", "-c", line, PYTHONPATH=str(REPO))
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_setup_says_in_a_line_that_there_is_no_home_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    setup = REPO / "trainer" / "setup.sh"
    done = subprocess.run(
        ["bash", setup], env={**clean_env(), "HOME": str(tmp_path / "file")}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Set HOME to a writable folder" in done.stderr.splitlines()[-1]
