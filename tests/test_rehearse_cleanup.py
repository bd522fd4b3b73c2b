"""What a rehearsal leaves behind: nothing, however it ends."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
from needs import needs_root
from support import clean_env
from support_rehearse import leftovers, trains

from skyspot.rehearsal import failure, interrupts, machine, namespace, scratch
from skyspot.rehearsal.engine import _folder
from skyspot.rehearsal.processes import MARK, below
from skyspot.rehearsal.task import read_task

WITHOUT = {"SKYSPOT_REHEARSE_WITHOUT_NAMESPACE": "1"}
BY_KERNEL = pytest.param({}, id="namespace")
BY_MARK = pytest.param(WITHOUT, id="without")


def until(what: str, holds: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not yet: {what}"
        time.sleep(0.02)


def skip_without_namespace(env: dict[str, str]) -> None:
    if not env and machine.namespace_command() is None:
        pytest.skip(needs_root("rehearsals in a namespace"))


DAEMONS = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
run: |
  setsid sleep 7777.MARK &
  nohup sleep 7777.MARK > /dev/null &
  (cd /; setsid bash -c 'sleep 7777.MARK & sleep 7777.MARK' &) &
  python -c 'import os, time
  if os.fork(): os._exit(0)
  os.setsid()
  if os.fork(): os._exit(0)
  os.execvp("sleep", ["sleep", "7777.MARK"])'
  touch /checkpoints/daemons
TRAINS  echo x > /checkpoints/result
"""
"""Five sleepers in the ways in which programs leave their parents."""


class Rehearsing:
    """A rehearsal that runs; its temporary folders lie in the test's folder."""

    def __init__(self, folder: Path, task: str, *args: str, env: dict[str, str] | None = None) -> None:
        self.folder, self.mark = folder, f"7777.{secrets.randbelow(10**9)}"
        (folder / "task.yaml").write_text(task.replace("7777.MARK", self.mark).replace("TRAINS", trains(steps=12000)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "skyspot", "rehearse", "task.yaml", "--compare", "result", *args],
            cwd=folder, env=clean_env(TMPDIR=str(folder), **(env or {})),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            # A shell that starts the tests in the background has them ignore SIGINT, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def until(self, pattern: str) -> None:
        """Wait for a file."""
        found = self.process.poll
        until(pattern, lambda: list(self.folder.glob(pattern)) or found() is not None)
        assert found() is None, self.process.stderr and self.process.stderr.read()

    def sleepers(self) -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [process for process in found if process.info["cmdline"] == ["sleep", self.mark]]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def stale_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what the next rehearsal does at its start."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    scratch.remove_stale()


@pytest.mark.parametrize("env", [BY_KERNEL, BY_MARK])
def test_daemons_of_a_task_go_when_skyspot_is_killed_and_the_next_rehearsal_deletes_its_folder(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_namespace(env)
    killed = Rehearsing(tmp_path, DAEMONS, env=env)
    killed.until("skyspot-rehearsal-*/*/bucket/daemons")
    until("five sleepers", lambda: len(killed.sleepers()) == 5)  # The last one has yet to become one.
    stale_removed(tmp_path, monkeypatch)
    assert len(killed.sleepers()) == 5, "it lives"
    assert len(list(tmp_path.glob("skyspot-*"))) == 1
    killed.kill()
    until("the processes are gone", lambda: not killed.sleepers())
    until("what watched over them is gone", lambda: len(leftovers(tmp_path)) == 1)
    stale_removed(tmp_path, monkeypatch)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("env", [BY_KERNEL, BY_MARK])
def test_more_interrupts_do_not_stop_the_clean_up(tmp_path: Path, env: dict[str, str], number: int) -> None:
    skip_without_namespace(env)
    stopped = Rehearsing(tmp_path, DAEMONS, env=env)
    stopped.until("skyspot-rehearsal-*/*/bucket/daemons")
    while stopped.process.poll() is None:
        stopped.process.send_signal(number)
        time.sleep(0.002)
    stopped.process.communicate()
    assert leftovers(tmp_path) == []


def test_an_interrupt_while_a_process_is_asked_for_its_end_leaves_it_as_it_was() -> None:
    """Popen takes a lock one instruction before the `try` that gives it back; the clean-up's wait needs that lock."""
    asking = subprocess.Popen._internal_poll.__code__  # type: ignore[attr-defined]
    with subprocess.Popen(["sleep", "60"]) as process:

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            lock = frame.f_locals["self"]._waitpid_lock if frame.f_code is asking else None
            if lock and event == "line" and lock.locked():
                sys.settrace(None)
                handler = signal.getsignal(signal.SIGTERM)
                assert callable(handler)
                handler(signal.SIGTERM, frame)
            return trace if frame.f_code is asking else None

        def ask() -> None:
            sys.settrace(trace)
            try:
                process.poll()
                signal.pause()
            finally:
                sys.settrace(None)

        with pytest.raises(KeyboardInterrupt), interrupts.interrupted_once():
            ask()
        if stayed := process._waitpid_lock.locked():  # type: ignore[attr-defined]
            process._waitpid_lock.release()  # type: ignore[attr-defined]
        process.kill()
        assert not stayed


def assert_nothing_is_left(ended: Rehearsing, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End it by a signal."""
    ended.process.send_signal(number)
    ended.process.communicate()
    # What skyspot has started dies with it, by the kernel: a moment later.
    until("no process is left", lambda: not [line for line in leftovers(ended.folder) if "process" in line])
    if number == signal.SIGKILL:
        stale_removed(ended.folder, monkeypatch)
    assert leftovers(ended.folder) == []
    assert not ended.sleepers()


PHASES = {
    "probe": "skyspot-probe-*/build.sh",
    "mount": "skyspot-rehearsal-*/*/machine-*/daemons.json",
    "root": "skyspot-rehearsal-*/*/machine-*/root",
    "log": "skyspot-rehearsal-*/*/machine-*.log",
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_rehearsal_that_ends_while_a_machine_starts_leaves_nothing(
    tmp_path: Path, phase: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine.bucketfs_missing():
        pytest.skip(needs_root("buckets through FUSE"))
    ended = Rehearsing(tmp_path, DAEMONS)
    ended.until(PHASES[phase])
    assert_nothing_is_left(ended, number, monkeypatch)


COMPARED = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
run: |
  n=$(cat /checkpoints/n 2> /dev/null || echo 0)
  while [ $n -lt 20 ]; do
    n=$((n + 1)); sleep 0.02; echo $n > /checkpoints/n.new; mv /checkpoints/n.new /checkpoints/n
  done
  echo x > /checkpoints/result
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_rehearsal_that_ends_during_a_comparison_leaves_nothing(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "compare.sh"
    ended = Rehearsing(
        tmp_path, COMPARED, "--compare-with", f"bash {script}", "--kinds", "kill", "--preemptions", "1",
        "--processes", "1",
    )  # fmt: skip
    mark = ended.mark
    script.write_text(f"setsid sleep {mark} &\nsleep {mark} &\ntouch {tmp_path}/compares\nsleep {mark}\n")
    ended.until("compares")
    until("it compares", lambda: len(ended.sleepers()) == 3)
    assert_nothing_is_left(ended, number, monkeypatch)


def test_the_reader_of_torch_files_ends_with_skyspot(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04 and more")
    program = (
        "import sys\nfrom pathlib import Path\nfrom skyspot.rehearsal.compare.torch_files import torch_entries\n"
        f"with torch_entries(Path({str(tmp_path / 'weights.pt')!r}), sys.executable): pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env=clean_env(PYTHONPATH=str(tmp_path)))
    pid = tmp_path / "pid"
    until("it reads", lambda: pid.exists() and pid.read_text())
    process.kill()
    process.wait()
    until("it is gone", lambda: not psutil.pid_exists(int(pid.read_text())))


def test_a_machine_whose_parent_died_before_it_started_runs_nothing(tmp_path: Path) -> None:
    enter = machine.namespace_command()
    if enter is None:
        pytest.skip(needs_root("rehearsals in a namespace"))
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "build.sh").write_text(f"touch {tmp_path}/built\n")
    arguments = [dead.pid, tmp_path / "build.sh", tmp_path / "root", tmp_path / "run.sh", 1]
    done = subprocess.run([*enter, *map(str, arguments)], capture_output=True, timeout=60)
    assert done.returncode == 125, done.stderr
    assert not (tmp_path / "built").exists()


def test_a_machine_whose_outer_process_died_before_it_started_runs_nothing(tmp_path: Path) -> None:
    """The first process inside is forked, and its parent dies before it asks to die with it."""
    program = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from skyspot.rehearsal import namespace\nouter = os.getpid()\n"
        "def late():\n"
        "    if os.getpid() != outer:\n"
        "        os.kill(outer, signal.SIGKILL)\n"
        "        while os.getppid() == outer: time.sleep(0.01)\n"
        "namespace._die_with_parent = late\n"
        "namespace._inside = lambda *rest: Path(sys.argv[1]).touch() or 0\n"  # Not in a namespace: it must do nothing.
        "namespace.main(str(os.getppid()), 'build', 'root', 'script', '1')\n"
    )
    # Its output ends when the last process has exited.
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "ran")], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "ran").exists()


def test_sigterm_goes_to_all_only_inside_a_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    with pytest.raises(RuntimeError, match="namespace"):
        namespace._terminate_rest(0.0, "/nowhere", set())
    assert not sent


def test_a_machine_is_removed_even_if_its_removal_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = machine.Machine(read_task("run: unused\n", tmp_path, {}, None), tmp_path / "r/leg/m", {}, {})
    taken.start("touch started; sleep 600\n")
    until("it runs", lambda: (taken.home / "sky_workdir" / "started").exists())
    interrupted: list[str] = []

    def interrupt(place: str) -> None:
        if not interrupted:
            interrupted.append(place)
            raise KeyboardInterrupt
        delete_after(place)

    delete_after = machine.kill_below
    monkeypatch.setattr(machine, "kill_below", interrupt)
    with pytest.raises(KeyboardInterrupt):
        taken.take()
    assert not taken.folder.exists()
    assert not below(str(taken.folder))


# -- what a killed rehearsal left, and what only looks like it ---------------------------------------------------------


def left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder of a rehearsal that was killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    program = "import os, signal\nfrom skyspot.rehearsal import scratch\nprint(scratch.make('rehearsal'), flush=True)\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "os.kill(os.getpid(), signal.SIGKILL)"],
        env=clean_env(TMPDIR=str(folder)), capture_output=True, text=True,
    )  # fmt: skip
    made = Path(done.stdout.strip())
    (made / "reference").mkdir()
    assert made.parent == folder.resolve()
    return made


def test_a_folder_that_a_killed_rehearsal_left_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = left_behind(tmp_path, monkeypatch)
    scratch.remove_stale()
    assert not made.exists()


def test_a_rehearsal_deletes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = left_behind(tmp_path, monkeypatch)
    with _folder(tmp_path / "kept"):
        assert not made.exists()


def test_of_what_is_kept_the_disk_of_a_machine_is_no_part(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    with suppress(KeyboardInterrupt), _folder(keep) as folder:
        (folder / "reference" / "machine-01" / "home").mkdir(parents=True)
        (folder / "reference" / "machine-01.log").touch()
        (folder / "reference" / "bucket" / "machine-01").mkdir(parents=True)
        raise KeyboardInterrupt
    assert sorted(str(path.relative_to(keep)) for path in keep.rglob("*")) == [
        "reference", "reference/bucket", "reference/bucket/machine-01", "reference/machine-01.log",
    ]  # fmt: skip


def _renamed(made: Path) -> None:
    made.rename(made.with_name("skyspot-rehearsal-mine"))


def _copied(made: Path) -> None:
    shutil.copytree(made, made.with_name("skyspot-rehearsal-mine"))
    shutil.rmtree(made)


def _of_another_machine(made: Path) -> None:
    owner = made / scratch.OWNER
    owner.write_text(owner.read_text().replace(socket.gethostname(), "another"))


def _without_owner(made: Path) -> None:
    (made / scratch.OWNER).unlink()


def _with_a_link(made: Path) -> None:
    (made / scratch.OWNER).rename(made.with_name("owner"))
    (made / scratch.OWNER).symlink_to(made.with_name("owner"))


def _a_link(made: Path) -> None:
    (made.parent / "elsewhere").mkdir()
    made.symlink_to(made.rename(made.parent / "elsewhere" / made.name))


def _with_a_pipe(made: Path) -> None:
    (made / scratch.OWNER).unlink()
    os.mkfifo(made / scratch.OWNER)


def _of_another_user(made: Path) -> None:
    if os.geteuid():
        pytest.skip(needs_root("a folder of another user"))
    os.chown(made, 12345, 12345)


def _with_an_owner_of_another_user(made: Path) -> None:
    if os.geteuid():
        pytest.skip(needs_root("a file of another user"))
    os.chown(made / scratch.OWNER, 12345, 12345)


@pytest.mark.parametrize(
    "change",
    [
        _renamed, _copied, _of_another_machine, _without_owner, _with_a_link, _a_link, _with_a_pipe,
        _of_another_user, _with_an_owner_of_another_user,
    ],
)  # fmt: skip
def test_a_folder_that_is_not_provably_a_killed_rehearsals_stays(
    tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(left_behind(tmp_path, monkeypatch))
    scratch.remove_stale()
    assert [path.name for path in tmp_path.rglob("reference")] == ["reference"]


def test_a_folder_that_a_process_lives_in_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = left_behind(tmp_path, monkeypatch)
    lives = subprocess.Popen(["sleep", "600"], cwd=made / "reference")
    scratch.remove_stale()
    assert made.exists()
    assert lives.poll() is None
    lives.kill()
    lives.wait()
    scratch.remove_stale()
    assert not made.exists()


def test_a_folder_with_a_file_that_a_process_reads_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = left_behind(tmp_path, monkeypatch)
    with (made / "reference" / "machine-01.log").open("w"):
        scratch.remove_stale()
        assert made.exists()
    scratch.remove_stale()
    assert not made.exists()


def test_a_process_of_a_killed_rehearsal_is_killed_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its guard was killed too."""
    made = left_behind(tmp_path, monkeypatch)
    mark = str(made / "reference" / "machine-01")
    ours = subprocess.Popen(["sleep", "600"], cwd=made, env={**os.environ, MARK: mark})
    alike = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: f"{made}x/machine-01"})
    try:
        scratch.remove_stale()
        assert ours.poll() is not None
        assert not made.exists()
        assert alike.poll() is None
    finally:
        for process in (ours, alike):
            process.kill()
            process.wait()


def test_a_folder_that_is_deleted_half_way_is_still_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = left_behind(tmp_path, monkeypatch)

    def killed(path: Path) -> None:
        shutil.rmtree(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(scratch, "delete_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            scratch.remove_stale()
    assert (made / scratch.OWNER).exists()
    scratch.remove_stale()
    assert not made.exists()


def test_the_log_of_a_failed_attempt_is_kept_only_by_a_rehearsal_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    log = tmp_path / "machine-01.log"
    log.write_text("an error\n")
    with suppress(KeyboardInterrupt), _folder(None):
        kept = failure.keep_log(log, "copy", kept=False)
        assert kept
        assert kept.read_text() == "an error\n"
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == []
    with _folder(None):
        kept = failure.keep_log(log, "copy", kept=False)
        assert kept
        scratch.keep(kept.parent)
    scratch.remove_stale()
    assert [path.name for path in kept.parent.iterdir()] == ["copy"]


def test_folders_that_a_task_made_read_only_are_deleted(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom skyspot.rehearsal.scratch import delete_tree\n"
        "made = Path(sys.argv[1], 'made')\n(made / 'a' / 'b').mkdir(parents=True)\n(made / 'a/b/file').touch()\n"
        "(made / 'a' / 'b').chmod(0o555)\n(made / 'a').chmod(0o500)\ntry: (made / 'a/b/file').unlink()\n"
        "except PermissionError: print('refused')\ndelete_tree(made)\nprint(made.exists())\n"
    )
    as_user: list[str] = []
    if os.geteuid() == 0:  # Root may delete everything.
        power = "-dac_override,-dac_read_search"
        as_user = ["setpriv", f"--bounding-set={power}", f"--inh-caps={power}"]
    done = subprocess.run(
        [*as_user, sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=clean_env()
    )
    assert done.stdout == "refused\nFalse\n", done.stderr
