"""Commands whose bucket does not answer: they say so within their limit, and Ctrl-C ends them at once.

A process that has called into a hung mount is never reaped, so each command here is a real process that has to be.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import clean_env

from skyspot.runs import workers

if TYPE_CHECKING:
    import faultfs

ENDS_S = 45
"""A command has to end by then; one that hangs would not end at all."""
# (longest wait for all buckets, for one look into a bucket, for SkyPilot's list of its buckets), in seconds. A test
# shortens the one limit that it is about: of two equal ones, either may pass first.
NEVER = (1000.0, 1000.0, 1000.0)
ALL = (1.0, *NEVER[1:])
LOOK = (NEVER[0], 1.0, NEVER[2])
LISTING = (*NEVER[:2], 1.0)

# A command with a queue of SkyPilot's that holds these jobs, and limits that a test has time for.
PROGRAM = """
import signal, sys, threading
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's job in the background ignores it.
from skyspot.runs import workers
from skyspot.cli import main as cli
from skyspot.jobs import training as jobs
from skyspot.jobs import client as managed_jobs
from skyspot.jobs.client import Job
from skyspot.runs.progress import run_progress
from trainer.layout.names import RunPaths
tasks, (all_s, look_s, listing_s), started, words = eval(sys.argv[1])
listed = [Job(n, f"run-{n}", "RUNNING", "1x", "aws", 0, 1e9, 60.0, "", task) for n, task in enumerate(tasks, 1)]
managed_jobs.queue = lambda *args, **more: listed
managed_jobs.check = lambda *args: []
managed_jobs.bucket_url = lambda name: print("listing", flush=True) or threading.Event().wait()
managed_jobs.cancel = lambda id: print("cancelled", id)
if started:
    run_progress(RunPaths(Path("/proc/run")))  # Starts the worker process, and imports there what reads a run.
jobs.READ_S, workers.TIMEOUT_S, jobs.LISTING_S = all_s, look_s, listing_s
sys.argv[1:] = words
cli.main()
"""


def task(folder: object) -> str:
    return f'envs: {{SKYSPOT_CHECKPOINT_DIR: "{folder}"}}\nrun: x'


def start(
    tasks: list[str], *words: str, limits: tuple[float, float, float] = LOOK, started: bool = False,
    cwd: Path | None = None, **env: str,
) -> subprocess.Popen:  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, repr((tasks, limits, started, list(words)))],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env=clean_env(COLUMNS="200", **env), start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit status and all that it said; it ends by itself."""
    try:
        out, err = process.communicate(timeout=ENDS_S)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the command hangs")
    return process.returncode, out + err


@pytest.fixture
def hung(faults: "faultfs.Client", tmp_path: Path) -> Iterator["faultfs.Client"]:
    """A mount at tmp_path / "m" / "mount" whose listings never come, until the test is over."""
    (tmp_path / "behind" / "run" / "attempts").mkdir(parents=True)
    faults.hang("list", times=1000)
    yield faults
    faults.clear()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """An S3 server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(ENDS_S)
        yield server


@pytest.fixture
def silent(server: socket.socket) -> dict[str, str]:
    """That server as an environment."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


S3 = 'envs: {SKYSPOT_CHECKPOINT_DIR: /c/run}\nfile_mounts: {/c: {source: "s3://mine"}}\nrun: x'
MADE = "envs: {SKYSPOT_CHECKPOINT_DIR: /c/run}\nfile_mounts: {/c: {name: mine, mode: MOUNT}}\nrun: x"
"""A task whose bucket SkyPilot has created: it alone knows the URL."""


def test_a_hung_mount_is_said_in_its_row_and_the_queue_ends(hung: "faultfs.Client", tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tasks = [task(tmp_path / "m" / "mount" / "run"), task(tmp_path / "run")] * 5
    code, said = ended(start(tasks, "queue", limits=(3.0, *NEVER[1:]), started=True))
    assert code == 0, said
    assert said.count("bucket did not answer within 3 s") == 5
    assert said.count("its run folder is empty") == 5, "a hung bucket takes the others' rows with it"


def test_a_server_that_never_answers_is_said_in_its_row(silent: dict[str, str]) -> None:
    code, said = ended(start([S3] * 20, "queue", "--json", limits=ALL, **silent))
    assert code == 0, said
    assert [row["unread"] for row in json.loads(said)] == ["its bucket did not answer within 1 s"] * 20


@pytest.mark.parametrize("words", [["queue"], ["cancel", "1"], ["checkpoints", "list", "m/mount/run"]], ids=" ".join)
def test_ctrl_c_ends_a_command_that_waits_for_a_hung_mount(
    hung: "faultfs.Client", tmp_path: Path, words: list[str]
) -> None:
    process = start([task(tmp_path / "m" / "mount" / "run")], *words, limits=NEVER, cwd=tmp_path)
    end = time.monotonic() + ENDS_S
    while not hung.hits() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert (code, said.strip()) == (130, "Interrupted.")


@pytest.mark.parametrize("words", [["queue"], ["cancel", "1"], ["checkpoints", "list", "s3://mine/run"]], ids=" ".join)
def test_ctrl_c_ends_a_command_that_waits_for_a_server_that_never_answers(
    server: socket.socket, silent: dict[str, str], words: list[str]
) -> None:
    process = start([S3], *words, limits=NEVER, **silent)
    with server.accept()[0]:
        process.send_signal(signal.SIGINT)
        code, said = ended(process)
    assert (code, said.strip()) == (130, "Interrupted.")


def written(folder: Path) -> Path:
    """A project's folder with the task of a run whose bucket SkyPilot has created."""
    (folder / ".skyspot").mkdir()
    (folder / ".skyspot" / "run-1.yaml").write_text(MADE)
    (folder / "t.yaml").write_text(MADE)
    return folder


@pytest.mark.parametrize(
    "words", [["queue"], ["cancel", "1"], ["checkpoints", "list", "run-1"], ["launch", "t.yaml", "--dryrun"]],
    ids=" ".join,
)  # fmt: skip
def test_ctrl_c_ends_a_command_that_waits_for_skypilots_buckets(tmp_path: Path, words: list[str]) -> None:
    process = start([MADE], *words, limits=NEVER, cwd=written(tmp_path))
    assert process.stdout
    assert process.stdout.readline() == "listing\n"
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    assert (code, said.strip()) == (130, "Interrupted.")


@pytest.mark.parametrize(
    ("words", "code", "why", "then"),
    [
        (["cancel", "1"], 0, "; cancelling now, the trainer saves when it gets SIGTERM", "cancelled 1"),
        (["launch", "t.yaml", "--dryrun"], 0, "", "Dry run: nothing was written or submitted."),
        (["checkpoints", "list", "run-1"], 1, "", "Error: "),
        (["checkpoints", "verify", "run-1"], 1, "", "Error: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_where_skypilots_list_of_its_buckets_never_comes_a_command_says_so_and_ends(
    tmp_path: Path, words: list[str], code: int, why: str, then: str
) -> None:
    left, said = ended(start([MADE], *words, limits=LISTING, cwd=written(tmp_path)))
    assert left == code, said
    assert then in said
    assert f"SkyPilot cannot locate its bucket mine (its list of buckets did not answer within 1 s){why}" in said


@pytest.mark.parametrize(
    ("limits", "unread"),
    [
        (ALL, "its bucket did not answer within 1 s"),
        (LISTING, "SkyPilot cannot locate its bucket mine (its list of buckets did not answer within 1 s)"),
    ],
    ids=["all-buckets", "skypilots-list"],
)
def test_queue_says_which_of_its_limits_has_passed(
    tmp_path: Path, limits: tuple[float, float, float], unread: str
) -> None:
    code, said = ended(start([MADE], "queue", limits=limits, cwd=written(tmp_path)))
    assert code == 0, said
    assert f"1: no progress shown: {unread}\n" in said


def test_cancel_cancels_a_job_whose_bucket_hangs(hung: "faultfs.Client", tmp_path: Path) -> None:
    code, said = ended(start([task(tmp_path / "m" / "mount" / "run")], "cancel", "1"))
    assert code == 0, said
    assert "did not answer within 1 s; cancelling now, the trainer saves when it gets SIGTERM" in said
    assert "cancelled 1" in said


@pytest.mark.parametrize("command", ["list", "verify"])
def test_checkpoints_says_that_a_mount_hangs(hung: "faultfs.Client", tmp_path: Path, command: str) -> None:
    code, said = ended(start([], "checkpoints", command, "m/mount/run", cwd=tmp_path))
    assert (code, said) == (1, f"Error: {tmp_path}/m/mount/run did not answer within 1 s\n")


def test_a_launch_says_that_it_could_not_look_into_a_hung_bucket(hung: "faultfs.Client", tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(task(tmp_path / "m" / "mount" / "run"))
    code, said = ended(start([], "launch", "t.yaml", "--dryrun", cwd=tmp_path))
    assert code == 0, said
    assert "Run folder:  not read" in said
    assert "did not answer" in said


def test_threads_that_ask_at_once_share_one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Slow:
        def __init__(self) -> None:
            made.append(self)
            time.sleep(0.2)

    monkeypatch.setattr(workers, "_WorkerProcess", Slow)
    workers._only_worker.cache_clear()
    try:
        assert len(set(workers.run_all([workers._worker] * 8, ENDS_S, 8))) == len(made) == 1
    finally:
        workers._only_worker.cache_clear()


def test_the_child_imports_nothing_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("json", "pickle", "queue"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    child = workers._WorkerProcess()
    assert child.call(tmp_path, len, ("ab",), ENDS_S) == len("ab")
    end(child)


def end(child: workers._WorkerProcess) -> None:
    """Have it leave; its pipe is closed once nobody reads from it any more."""
    assert child._process.stdin
    assert child._process.stdout
    child._process.stdin.close()
    assert child._process.wait(ENDS_S) == 0
    child._listener.join(ENDS_S)
    child._process.stdout.close()


def fails_oddly() -> None:
    error = ValueError("two words")
    error.told = lambda: None  # type: ignore[attr-defined]  # Cannot be written.
    raise error


class TwoWordsError(Exception):
    """Is written by pickle, and cannot be read again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def fails_in_two_words() -> None:
    raise TwoWordsError("two", "words")


@pytest.mark.parametrize("function", [fails_oddly, fails_in_two_words])
def test_an_error_that_cannot_come_over_from_the_child_comes_as_its_text(function, monkeypatch) -> None:
    child = workers._WorkerProcess()
    with pytest.raises(RuntimeError, match="two words"):
        child.call(Path("/x"), function, (), ENDS_S)
    assert child.call(Path("/x"), len, ("it goes on",), ENDS_S) == len("it goes on")
    end(child)


def test_what_may_hang_is_told_by_its_mount_through_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "relative").symlink_to("../link")
    (tmp_path / "loop").symlink_to("loop")
    assert workers._may_hang(tmp_path / "link" / "run")
    assert workers._may_hang(tmp_path / "folder" / "relative" / "run")
    for disk in (tmp_path / "folder", tmp_path / "loop" / "x", tmp_path / "folder" / ".." / "run"):
        assert workers._may_hang(disk) == workers._may_hang(tmp_path)
