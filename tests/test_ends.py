"""What an attempt ends with, and says, however the script's `with SpotRun(...)` block ends."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support import clean_env, event, launch

import trainer.__main__
import trainer.launch.__main__
from trainer import RunConfig, SpotRun
from trainer.layout.names import RunPaths, list_attempts
from trainer.training.unwinding import open_files


class Left(BaseException):
    """In place of the process' end."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[SpotRun], None]], int]]:
    """Runs the inside of a `with SpotRun(...)` block in this process; returns what the process would end with."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for name in ("RANK", "WORLD_SIZE", "SKYSPOT_LINK", "SKYSPOT_MOUNT", "SKYSPOT_GRACE_S"):
        monkeypatch.delenv(name, raising=False)

    def leave(code: int) -> None:
        raise Left(code)

    def inside(work: Callable[[SpotRun], None], **options: object) -> int:
        config = RunConfig(checkpoint_dir=tmp_path / "run", max_steps=1, **options)
        run = SpotRun(config)
        run.unwinds = False
        with pytest.raises(Left) as left, run:
            work(run)
        return left.value.code

    monkeypatch.setattr(os, "_exit", leave)
    # Its thread would outlive the attempt, and end pytest where a call of another test's hangs.
    monkeypatch.setattr(SpotRun, "_watch_the_bucket", lambda run: None)
    yield inside
    for number, handler in before.items():
        signal.signal(number, handler)


def fail(run: SpotRun) -> None:
    with suppress(ValueError):
        raise ValueError("of the script's own")


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda run: None, 1, "Error: the `with SpotRun(...)` block ended before the training was done"),
        (fail, 1, "Error: the `with SpotRun(...)` block ended before the training was done"),
        (lambda run: sys.exit(), 1, "Error: the script called sys.exit(0) before the training was done"),
        (lambda run: sys.exit(0), 1, "Error: the script called sys.exit(0) before the training was done"),
        (lambda run: sys.exit("no data in /here"), 1, "no data in /here\n"),
        (lambda run: sys.exit(["a", "list"]), 1, "['a', 'list']\n"),
        (lambda run: sys.exit(3), 3, ""),
        (lambda run: sys.exit(75), 75, ""),
        (lambda run: sys.exit(256), 1, ""),
        (lambda run: sys.exit(-1), 255, ""),
    ],
    ids=["no-train", "caught", "exit", "exit-0", "message", "list", "exit-3", "exit-75", "exit-256", "exit--1"],
)
def test_a_block_that_ends_without_training_is_never_a_run_that_is_done(
    ended, tmp_path: Path, capfd, work, code: int, said: str
) -> None:
    assert ended(work) == code
    errors = capfd.readouterr().err
    assert errors.startswith(said)
    assert errors.count("\n") == (1 if said else 0)
    assert event(tmp_path / "run", "end")["code"] == code
    assert event(tmp_path / "run", "end")["cause"] == "error"


@pytest.mark.parametrize("work", [lambda run: None, lambda run: sys.exit(0)], ids=["to its end", "exit"])
def test_a_block_that_ends_after_training_is_a_run_that_is_done(ended, tmp_path: Path, capfd, work) -> None:
    def trained(run: SpotRun) -> None:
        run.final_is_whole = True  # As `train` leaves it.
        work(run)

    assert ended(trained) == 0
    assert capfd.readouterr().err == ""
    assert event(tmp_path / "run", "end")["cause"] == "finished"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_that_imports_the_script_opens_no_attempt(tmp_path: Path, method: str) -> None:
    """As a DataLoader's does whose script has no `if __name__ == "__main__":`."""
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "from pathlib import Path\n"
        "from trainer import RunConfig, SpotRun\n"
        f"with SpotRun(RunConfig(checkpoint_dir=Path(r'{tmp_path}/run'), max_steps=1)):\n"
        f"    worker = multiprocessing.get_context('{method}').Process(target=print)\n"
        "    worker.start()\n"
        "    worker.join()\n"
        "    raise SystemExit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=clean_env(), capture_output=True, text=True, timeout=120
    )
    said = [line for line in done.stderr.splitlines() if "imports this script" in line]
    assert len(said) == 1, done.stderr
    assert '`if __name__ == "__main__":`' in said[0]
    assert len(list_attempts(RunPaths(tmp_path / "run"))) == 1


@pytest.mark.parametrize(
    ("cloud", "launchers", "scripts", "expected", "said"),
    [
        ("", "10.0", None, 10, ""),
        ("", "60.0", None, 60, ""),
        ("", None, None, 25, ""),
        ("Lambda", None, None, 25, ""),
        ("RunPod", None, None, 5, ""),
        ("RunPod", None, 12.0, 12, ""),
        ("RunPod", "12.0", None, 12, ""),
        ("", None, 40.0, 40, ""),
        ("", "25.0", 4.0, 4, ""),
        ("", "10.0", 60.0, 10, "grace_s=60 is reduced to 10, because the launcher kills 10 s after SIGTERM"),
        ("", "soon", 4.0, 4, ""),
    ],
)
def test_the_grace_is_the_launchers_or_what_the_script_says_where_that_is_less(
    ended, monkeypatch, capfd, cloud: str, launchers: str | None, scripts: float | None, expected: float, said: str
) -> None:
    if cloud:
        monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", json.dumps({"cloud": cloud}))
    if launchers:
        monkeypatch.setenv("SKYSPOT_GRACE_S", launchers)

    def look(run: SpotRun) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.notices.received.wait(10)
        notice = run.notices.first()
        assert notice
        assert (run.grace_s, run.config.grace_s, notice.seconds_left) == (expected,) * 3
        sys.exit(3)

    assert ended(look, grace_s=scripts) == 3
    output = capfd.readouterr().out.removesuffix("notices: SIGTERM\n")
    assert output.startswith(said)
    assert output.count("\n") == (1 if said else 0)


@pytest.mark.parametrize(
    ("options", "cloud", "expected"), [((), "", 25), ((), "RunPod", 5), (("--grace", "12"), "RunPod", 12)]
)
def test_a_launcher_gives_no_more_grace_than_the_cloud_unless_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], cloud: str, expected: float
) -> None:
    given: list[float] = []
    for module in (trainer.__main__, trainer.launch.__main__):
        monkeypatch.setattr(module, "launch", lambda command, *, grace_s, **more: given.append(grace_s) or 0)
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", json.dumps({"cloud": cloud}))
    (script := tmp_path / "script.py").touch()
    monkeypatch.setattr(sys, "argv", ["trainer.launch", "--processes", "1", *options, str(script)])
    assert trainer.launch.__main__.main() == 0
    run = ("--checkpoint-dir", str(tmp_path / "run"), "--data", str(tmp_path), "--max-steps", "1", "--processes", "1")
    monkeypatch.setattr(sys, "argv", ["trainer", *run, *options])
    assert trainer.__main__.main() == 0
    assert given == [expected, expected]


def test_open_files_are_found_without_a_question_to_other_objects() -> None:
    class Asked:
        @property
        def __class__(self) -> type:
            raise AssertionError("torch's reduce_op warns here")

    text, closed = io.StringIO(), io.StringIO()
    closed.close()
    assert open_files([Asked(), text, closed]) == [text]


LEAVES = """
import atexit
from trainer import SpotRun
import torch
import torch.distributed as dist

# Python calls what was registered last first.
atexit.register(lambda: print(f"at the end: {dist.is_initialized()}", flush=True))
with SpotRun(FOLDER) as run:
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.register(model=model, optimizer=optimizer)
    for batch in run.steps(torch.utils.data.DataLoader(torch.ones(8, 2)), until=2):
        model(batch).sum().backward()
        optimizer.step()
    run.finish()
dist.barrier()
print("after the block", flush=True)
"""


def test_the_process_groups_are_the_programs_after_the_run_and_gone_before_python_ends(tmp_path: Path) -> None:
    """Otherwise a thread of gloo's may free a tensor while Python ends: the process aborts, or never ends."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES.replace("FOLDER", repr(str(tmp_path / "run"))))
    done = launch(script, processes=2)
    assert done.code == 0, done.output
    assert sorted(done.output.splitlines()[-4:]) == ["after the block"] * 2 + ["at the end: False"] * 2


STOPS = """
import atexit, os, signal, sys, threading
from trainer import SpotRun
import torch
from trainer.training import unwinding

folder, hangs = sys.argv[1:]
if hangs != "nothing":
    unwinding.CLOSERS_S = 1.0
log = open(folder + "-log", "w")
atexit.register(print, "the closer", flush=True)
with SpotRun(folder, save_every=100) as run:
    model = torch.nn.Linear(2, 1)
    run.register(model=model)
    try:
        for batch in run.steps([torch.ones(1, 2)] * 4, until=4):
            if run.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                assert run.notices.received.wait(60)
    finally:
        print("the finally block", flush=True)
        log.write("a line of the script's own")
        if hangs == "a thread":
            threading.Thread(target=threading.Event().wait).start()
        if hangs == "the block":
            threading.Event().wait()
"""


@pytest.mark.parametrize("hangs", ["nothing", "a thread", "the block"])
def test_a_stop_lets_the_script_close_what_it_has_open_but_no_thread_keeps_the_process(
    tmp_path: Path, hangs: str
) -> None:
    """Python waits for threads before it calls the atexit functions."""
    (script := tmp_path / "stops.py").write_text(STOPS)
    done = launch(script, tmp_path / "run", hangs, timeout=30)
    assert done.code == 75, done.output
    assert event(tmp_path / "run", "end")["committed_step"] == 2
    said = [line for line in done.output.splitlines() if line in ("the finally block", "the closer")]
    assert said == ["the finally block", *(["the closer"] if hangs == "nothing" else [])]
    if hangs == "nothing":
        assert (tmp_path / "run-log").read_text() == "a line of the script's own", "it was never closed"
