"""A cloud's notice for a script that does not watch the metadata service itself: the launcher passes it on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from metadata_servers import AwsServer
from support import assert_holds, clean_env, event

from trainer.launch.cloud import Cloud
from trainer.launch.rank import Rank

HANDLES = """
import os, signal, sys, time
folder, code = sys.argv[1:]
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
signal.signal(signal.SIGUSR1, lambda *_: print("SIGUSR1", flush=True))
print("ready", flush=True)
while not heard or not os.path.exists(folder + "/go"):
    time.sleep(0.01)
print("saved", len(heard), flush=True)
sys.exit(int(code))
"""


@contextmanager
def begin(folder: Path, server: AwsServer, code: int, *options: object, **env: str) -> Iterator[subprocess.Popen[str]]:
    (folder / "script.py").write_text(HANDLES)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.launch", *map(str, options), str(folder / "script.py"), str(folder), str(code)],
        env=clean_env(**server.env, SKYSPOT_NOTICE_POLL_S="0.05", **env), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], line: str, times: int = 1) -> list[str]:
    """Read until a line has come so many times."""
    assert process.stdout
    found: list[str] = []
    while found.count(line) < times:
        text = process.stdout.readline()
        assert text, found
        found.append(text.rstrip("\n"))
    return found


def until_it_is_passed_on(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert any(line.startswith("aws-notice: 1") and "SIGTERM" in line for line in process.stdout)


def test_every_rank_gets_sigterm_once_and_the_launcher_holds_with_the_end_recorded(tmp_path: Path) -> None:
    with AwsServer() as server:
        options = ("--processes", 2, "--grace", 0.1, "--checkpoint-dir", tmp_path / "run")
        with begin(tmp_path, server, 75, *options) as process:
            said = until(process, "ready", 2)
            assert "notices: aws metadata, SIGTERM" in said
            server.announce(120)
            until_it_is_passed_on(process)
            os.kill(process.pid, signal.SIGTERM)  # SkyPilot may pass the notice on too.
            os.kill(process.pid, signal.SIGUSR1)
            until(process, "SIGUSR1", 2)
            (tmp_path / "go").touch()
            said = until(process, "holding until this machine is taken")
            assert said.count("saved 1") == 2, said
            assert_holds(process)
            ended = event(tmp_path / "run", "end")
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(60) == 75
    assert (ended["cause"], ended["code"]) == ("notice", 75)


def test_the_launcher_of_another_machine_holds_too(tmp_path: Path) -> None:
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    with AwsServer() as server, begin(tmp_path, server, 75, "--cpu", **nodes, SKYPILOT_TASK_ID="t") as process:
        (tmp_path / "go").touch()
        until(process, "ready")
        server.announce(120)
        until(process, "holding until this machine is taken")
        assert_holds(process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75


@pytest.mark.parametrize("code", [0, 1, 76])
def test_a_script_that_ends_otherwise_at_a_notice_leaves_with_its_code_at_once(tmp_path: Path, code: int) -> None:
    with AwsServer() as server, begin(tmp_path, server, code, "--cpu") as process:
        (tmp_path / "go").touch()
        until(process, "ready")
        server.announce(3600)
        until(process, "saved 1")
        assert process.wait(60) == code


def test_a_rank_gets_the_notice_once_it_handles_sigterm_and_no_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a handler it would only die of it: it trains on until the machine is taken."""
    code = (
        "import signal\nprint('begun', flush=True)\ninput()\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\nprint('handles', flush=True)\ninput()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with AwsServer() as server, subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        for key, value in {**server.env, "SKYSPOT_NOTICE_POLL_S": "0.02"}.items():
            monkeypatch.setenv(key, value)
        from_rank, to_launcher = os.pipe()
        rank = Rank(process, to_rank=-1, from_rank=from_rank)
        cloud = Cloud([rank], os.open(os.devnull, os.O_RDWR))
        server.announce(3600)
        assert process.stdout
        assert process.stdin
        end = time.monotonic() + 30
        while not cloud._notice:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert process.stdout.readline() == "begun\n"
        assert cloud.pass_on() == []
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "handles\n"
        assert cloud.pass_on() == [rank]
        assert cloud.pass_on() == [], "once"
        rank.taken_at = None
        os.write(to_launcher, b"listens\n")
        assert cloud.pass_on() == [], "SpotRun watches itself"
        process.kill()
