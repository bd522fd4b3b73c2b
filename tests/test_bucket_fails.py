"""A bucket that fails for a while, or for good, before the first step: nothing is taken for lost that is not."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from support import PROGRAMS, clean_env, event, losses, mlp

from trainer.layout.names import RunPaths, list_attempts, list_checkpoints


def test_a_share_that_cannot_be_read_for_a_moment_is_read_again(run_dir: Path) -> None:
    done = mlp(run_dir, "--unreadable", f"{errno.EIO}:2")
    assert done.code == 0, done.output
    restored = event(run_dir, "restored")
    assert (restored["step"], restored["rejected"]) == (8, [])
    assert sorted(losses(run_dir)) == list(range(1, 13))


# An error of the disk's is nobody's preemption; a mount that is gone is mounted anew on the next machine.
@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 1), (errno.ENOTCONN, 75)])
def test_a_share_that_cannot_be_read_ends_the_attempt_and_starts_nothing_anew(
    run_dir: Path, number: int, code: int
) -> None:
    kept = list_checkpoints(RunPaths(run_dir))
    done = mlp(run_dir, "--unreadable", f"{number}:99", "--constant", "checkpoint.restore.READ_TRIES=2")
    assert done.code == code, done.output
    assert "cannot be read" in done.output
    assert "Traceback" not in done.output
    assert event(run_dir, "restored") == {}
    assert list_checkpoints(RunPaths(run_dir)) == kept
    assert mlp(run_dir).code == 0
    assert event(run_dir, "restored")["step"] == 8


def test_a_checkpoint_that_cannot_be_read_for_good_costs_steps_but_not_the_run(run_dir: Path) -> None:
    done = mlp(run_dir, "--unreadable", f"{errno.EIO}:99:8", "--constant", "checkpoint.restore.READ_TRIES=2")
    assert done.code == 0, done.output
    restored = event(run_dir, "restored")
    assert restored["step"] == 4
    assert [one["reason"] for one in restored["rejected"]] == ["it cannot be read: Input/output error"]  # type: ignore[attr-defined]
    assert sorted(losses(run_dir)) == list(range(1, 13))


def test_a_checkpoint_that_could_not_be_read_is_asked_for_again_once_an_older_one_can(run_dir: Path) -> None:
    done = mlp(run_dir, "--unreadable", f"{errno.EIO}:3:8", "--constant", "checkpoint.restore.READ_TRIES=2")
    assert done.code == 0, done.output
    restored = event(run_dir, "restored")
    assert (restored["step"], restored["rejected"]) == (8, [])


# The bucket fails for a moment; for good; the mount is gone; a machine that is about to be taken, and fails for that.
@pytest.mark.parametrize(
    ("trouble", "options", "code"),
    [
        (f"{errno.EIO}:2", (), 0),
        (f"{errno.EIO}:99", (), 1),
        (f"{errno.ENOTCONN}:1", (), 75),
        (f"{errno.EACCES}:1", ("--fault", "sigterm:export@12"), 75),
    ],
)
def test_a_bucket_that_fails_at_the_export(run_dir: Path, trouble: str, options: tuple[str, ...], code: int) -> None:
    ended = mlp(run_dir, "--unexportable", trouble, "--constant", "bucket.retry.START_RETRY_S=1", *options)
    assert ended.code == code, ended.output
    assert "Traceback" not in ended.output
    assert (run_dir / "final" / "MANIFEST.json").exists() == (code == 0)
    assert event(run_dir, "end")["code"] == code
    if code:
        assert mlp(run_dir).code == 0
        assert (run_dir / "final" / "MANIFEST.json").exists()
        assert event(run_dir, "restored")["step"] == 12


def test_the_model_of_another_run_is_neither_taken_for_this_ones_nor_deleted(tmp_path: Path, run_dir: Path) -> None:
    other = tmp_path / "other"
    assert mlp(other, "--seed", 8).code == 0
    shutil.copytree(other / "final", run_dir / "final")
    before = {path: path.read_bytes() for path in sorted((run_dir / "final").iterdir())}
    done = mlp(run_dir)
    assert done.code == 1
    assert "final holds the model of another run" in done.output
    assert "Traceback" not in done.output
    assert {path: path.read_bytes() for path in sorted((run_dir / "final").iterdir())} == before


@pytest.mark.parametrize("options", [(), ("--last-to-say",)], ids=["at-once", "the-other-gone"])
def test_two_processes_say_once_what_both_cannot_read(run_dir: Path, options: tuple[str, ...]) -> None:
    done = mlp(run_dir, "--unreadable", f"{errno.EACCES}:99", *options, processes=2)
    assert done.code == 1
    assert done.output.count("Error:") == 1


def begin(folder: Path, kept: bool) -> subprocess.Popen[str]:
    """Start an attempt on a folder that cannot be made (yet): what should be it is a link that leads nowhere."""
    (folder / "run").symlink_to(folder / "later")
    options = ["--checkpoint-dir", str(folder / "run")] if kept else []
    script = folder / "script.py"
    script.write_text("print('done')\n")
    program = [str(script)] if kept else [str(PROGRAMS / "mlp.py"), "--dir", str(folder / "run")]
    process = warm.Popen(
        [sys.executable, "-m", "trainer.launch", "--processes", "1", "--grace", "60", *options, *program],
        env=clean_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    assert "retrying for up to 10 minutes" in process.stdout.readline()
    return process


@pytest.mark.parametrize("kept", [False, True], ids=["spotrun", "script"])
def test_a_bucket_that_cannot_be_written_yet_is_waited_for(tmp_path: Path, kept: bool) -> None:
    process = begin(tmp_path, kept)
    (tmp_path / "later").mkdir()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert len(list_attempts(RunPaths(tmp_path / "later"))) == 1


@pytest.mark.parametrize("kept", [False, True], ids=["spotrun", "script"])
def test_a_stop_is_heard_while_the_bucket_is_waited_for(tmp_path: Path, kept: bool) -> None:
    process = begin(tmp_path, kept)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 75, output
    assert not (tmp_path / "later").exists()


def test_a_bucket_that_stays_unwritable_ends_the_attempt_with_1(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "later")
    done = mlp(tmp_path / "run", "--constant", "bucket.retry.START_RETRY_S=0.5")
    assert done.code == 1, done.output
    assert "nothing was trained" in done.output


def test_a_script_is_not_started_where_no_bucket_is_mounted(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('ran')\n")
    done = warm.run(
        [sys.executable, "-m", "trainer.launch", "--checkpoint-dir", str(tmp_path / "not-there" / "run"), str(script)],
        env=clean_env(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "no such folder" in done.stderr
    assert done.stdout == ""


def test_a_run_of_a_newer_release_is_refused_before_anything_is_written(run_dir: Path) -> None:
    (run_dir / "run.json").write_text('{"layout_version": 99, "run_id": "x"}')
    before = sorted(run_dir.rglob("*"))
    done = mlp(run_dir)
    assert done.code == 1
    assert "Upgrade skyspot" in done.output
    assert "Traceback" not in done.output
    assert sorted(run_dir.rglob("*")) == before
    assert '"layout_version": 99' in (run_dir / "run.json").read_text()


def test_more_steps_than_are_asked_for_are_not_undone(run_dir: Path) -> None:
    done = mlp(run_dir, "--steps", 6, "--allow", "max_steps")
    assert done.code == 1
    assert "is already at step 8, past max_steps (6)" in done.output
    assert not (run_dir / "final").exists()


def test_a_finished_run_of_which_more_is_asked_goes_on(run_dir: Path) -> None:
    assert mlp(run_dir).code == 0
    assert mlp(run_dir, "--steps", 14, "--allow", "max_steps").code == 0
    assert event(run_dir, "restored")["step"] == 12
    assert sorted(losses(run_dir)) == list(range(1, 15))


def test_a_process_that_dies_while_another_prepares_is_a_peer_gone_and_no_signal(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = mlp(run_dir, "--prepare", 60, "--fault", "die:prepare@0", "--fault-rank", 1, processes=2)
    assert done.code == 75, done.output
    assert event(run_dir, "end")["cause"] == "peer-gone"


def test_a_parameter_without_a_shape_is_refused_and_said_once(tmp_path: Path) -> None:
    done = mlp(tmp_path / "run", "--lazy", processes=2)
    assert done.code == 1
    assert done.output.count("has no shape yet") == 1
    assert "Traceback" not in done.output
