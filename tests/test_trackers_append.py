"""Weights & Biases and Trackio get what is committed: no step comes twice, and none is missing."""

import json
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from curves import recorded, shown
from in_process import Attempts
from support import clean_env, event, history, mlp
from test_trackers import UNTIL, loop
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from trainer.layout.names import RunPaths, list_attempts
from trainer.trackers import reporter
from trainer.trackers.curve import Point

Row = tuple[int, dict[str, Any]]
pytestmark = pytest.mark.usefixtures("patient")


def newest(run_dir: Path, tracker: str, pattern: str) -> Path:
    """The file in the newest copy of what a tracker has written."""
    [folder] = (run_dir / tracker).iterdir()  # Older ones are deleted.
    [file] = folder.rglob(pattern)
    return file


def wandb_rows(run_dir: Path) -> tuple[str, list[Row]]:
    """The run's id and rows in the newest offline run, by W&B's own reader."""
    copy = run_dir.with_suffix(".wandb")
    shutil.copy(newest(run_dir, "wandb", "*.wandb"), copy)
    store, ids, rows = DataStore(), set(), []
    store.open_for_scan(str(copy))
    while data := store.scan_data():
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            ids.add(f"{record.run.project}/{record.run.run_id}")
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append((row["_step"], {name: value for name, value in row.items() if not name.startswith("_")}))
    store.close()
    [one] = ids
    return one, rows


def trackio_rows(run_dir: Path) -> tuple[str, list[Row]]:
    """The run's name and rows in the newest copy of Trackio's data base."""
    return rows_of(newest(run_dir, "trackio", "*.db"))


def rows_of(file: Path) -> tuple[str, list[Row]]:
    with closing(sqlite3.connect(file)) as base:
        found = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        assert base.execute("SELECT count(DISTINCT run_id) FROM metrics").fetchone() == (1,)
    [name] = {name for name, *_ in found}
    rows = [(step, json.loads(metrics)) for _, step, metrics in found]
    return f"{file.stem}/{name}", rows


ROWS: dict[str, Callable[[Path], tuple[str, list[Row]]]] = {"wandb": wandb_rows, "trackio": trackio_rows}


def expected(run_dir: Path) -> list[Row]:
    """The same from the lines of metrics that count."""
    rows: dict[int, dict[str, Any]] = {}
    for line in history(run_dir):
        values = {name: value for name, value in line.items() if not isinstance(value, str)}
        for name in ("step", "monotonic", "world_size"):
            values.pop(name, None)
        rows.setdefault(int(str(line["step"])), {}).update(values)
    return sorted(rows.items())


def plain(rows: list[Row]) -> list[Row]:
    """Rows in which NaN is None, as in the records."""
    return [
        (step, {name: None if value == "NaN" or value != value else value for name, value in row.items()})
        for step, row in rows
    ]


def steps(rows: list[Row]) -> list[int]:
    return [step for step, _ in rows]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def test_each_step_is_there_once_after_a_crash_beyond_a_checkpoint_and_a_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In pytest's own process; W&B leaves a service behind there, so the test below has it."""
    attempts = Attempts(tmp_path / "run")
    assert attempts.one(loop, 9, "crash", report_to="trackio") == 1
    name, rows = trackio_rows(attempts.folder)
    assert name == f"skyspot/run-{list_attempts(RunPaths(attempts.folder))[0].token}"
    assert steps(rows) == [1, 2, 3, 4, 5], "step 6 is committed; an evaluation of it could follow"
    assert attempts.one(loop, 8, "stop", report_to="trackio") == 75
    assert event(attempts.folder, "restored")["lost_steps"] == 2
    assert steps(trackio_rows(attempts.folder)[1]) == list(range(1, 8))
    assert attempts.one(loop, report_to="trackio") == 0
    again, rows = trackio_rows(attempts.folder)
    assert (again, plain(rows)) == (name, expected(attempts.folder))
    assert steps(rows) == list(range(1, UNTIL + 1))
    assert "(a step appears there once a later one is committed)" in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_that_are_killed_and_stopped_leave_one_curve_in_every_tracker(tmp_path: Path) -> None:
    options = ["--steps", 12, "--report-to", "tensorboard,wandb,trackio", "--eval-every", 2]
    now = [f"--constant=trackers.reporter.{name}=0" for name in ("PUBLISH_S", "PUBLISH_SHARE")]
    run_dir = tmp_path / "run"
    mlp(run_dir, *options, *now, "--commit-first", "--fault", "await-trackers@6", "--fault", "kill@6", processes=2)
    run = f"skyspot/run-{list_attempts(RunPaths(run_dir))[0].token}"
    assert [step for step, _ in shown(run_dir)["loss"]] == [1, 2, 3, 4, 5, 6]
    stopped = mlp(run_dir, *options, "--fault", "sigterm@9", processes=2)
    assert stopped.code == 75, stopped.output
    done = mlp(run_dir, *options, processes=2)
    assert done.code == 0, done.output
    curve = shown(run_dir)
    assert [step for step, _ in curve["loss"]] == list(range(1, 13))
    assert [step for step, _ in curve["eval_loss"]] == list(range(2, 13, 2))
    for name in ("loss", "eval_loss", "lr", "grad_norm", "tokens"):
        assert curve[name] == recorded(run_dir, name), name
    for tracker, rows in ROWS.items():
        same, found = rows(run_dir)
        assert (same, plain(found)) == (run, expected(run_dir)), tracker


class Toy:
    """A tracker that keeps a list."""

    name, rewinds = "toy", False

    def __init__(self, first: int = 0) -> None:
        self.first, self.rows, self.published = first, list[Row](), 0

    def start(self) -> int:
        return self.first

    def where(self) -> str:
        return "here"

    def log(self, point: Point) -> None:
        self.rows.append((point.step, point.values))

    def publish(self) -> None:
        self.published += 1

    def finish(self, publish: bool) -> None:
        self.published += publish


def reported(toy: Toy, before: list[Point], lines: list[Point], committed: int, everything: bool = False) -> list[Row]:
    one = reporter.Reporter(toy, lambda: before, lambda: committed, lambda line: None)
    for line in lines:
        one.take(line)
    one.end(everything)
    assert one.over.wait(60)
    return toy.rows


def test_a_step_waits_for_a_later_checkpoint_and_for_its_evaluation() -> None:
    lines = [Point(3, {"loss": 3.0}), Point(4, {"loss": 4.0}), Point(4, {"eval_loss": 0.4}), Point(5, {"loss": 5.0})]
    before = [Point(1, {"loss": 1.0}), Point(2, {"loss": 2.0})]
    evaluated = [*before, Point(2, {"eval_loss": 0.2})]
    first, last = (1, {"loss": 1.0}), (5, {"loss": 5.0})
    second, fourth = (2, {"loss": 2.0, "eval_loss": 0.2}), (4, {"loss": 4.0, "eval_loss": 0.4})
    assert reported(Toy(), before, [], 2) == [first]
    assert reported(Toy(), evaluated, lines, 4) == [first, second, (3, {"loss": 3.0})]
    assert reported(Toy(), evaluated, lines, 5) == [first, second, (3, {"loss": 3.0}), fourth]
    assert reported(Toy(), evaluated, lines, 5, everything=True) == [first, second, (3, {"loss": 3.0}), fourth, last]
    # A server says which steps it has.
    assert reported(Toy(first=4), evaluated, lines, 5, everything=True) == [fourth, last]


SERVER = """
import trackio
app = trackio.show(open_browser=False, block_thread=False, frontend_dir=None)
print("url", app[3], flush=True)
input()
"""


def test_a_server_of_trackios_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the run between attempts, so each one goes on behind what it has: also behind the end of a stop."""
    env = clean_env(TRACKIO_DIR=str(tmp_path / "server"))
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url = next(line.split()[1] for line in server.stdout if line.startswith("url "))
        monkeypatch.setenv("TRACKIO_SERVER_URL", url)
        attempts = Attempts(tmp_path / "run")
        for strike, kind, code in ((9, "crash", 1), (8, "stop", 75), (0, "stop", 0)):
            assert attempts.one(loop, strike, kind, report_to="trackio") == code
        assert server.stdin
        server.stdin.write("\n")
        server.stdin.close()
    name, rows = rows_of(tmp_path / "server" / "skyspot.db")
    assert name == f"skyspot/run-{list_attempts(RunPaths(attempts.folder))[0].token}"
    assert plain(rows) == expected(attempts.folder)
    assert not (attempts.folder / "trackio").exists()
    token = url.partition("write_token=")[2]
    assert token
    assert not [path for path in attempts.folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_a_server_that_never_answers_delays_no_step_and_no_end_and_no_key_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    key, run_dir = "0123456789abcdef" * 2 + "01234567", tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", key)
        options = ("--report-to", "wandb", "--constant=trackers.tracking.STOPPED_S=0.1", "--fault", "sigterm@9")
        stopped = mlp(run_dir, *options)
    assert stopped.code == 75, stopped.output
    assert event(run_dir, "end")["committed_step"] in (9, 10)
    assert "wandb: not all metrics got there in time" in stopped.output
    assert not [path for path in run_dir.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
