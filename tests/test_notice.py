"""The word that the machine will be taken, from a real signal or a real metadata service on loopback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from support import PROGRAMS, clean_env, event

from skyspot.rehearsal.metadata import AwsMetadata
from trainer.attempt import notices as notice
from trainer.attempt.notices import Notices
from trainer.layout.names import RunPaths, list_attempts


def listening(server: AwsMetadata, monkeypatch: pytest.MonkeyPatch, ignored: frozenset[str] = frozenset()) -> Notices:
    for key, value in {**server.env(), "SKYSPOT_NOTICE_POLL_S": "0.02"}.items():
        monkeypatch.setenv(key, value)
    notices = Notices(25.0, ignored)
    notices.poll_metadata()
    return notices


def asked_again(server: AwsMetadata, times: int = 3) -> None:
    end, before = time.monotonic() + 20, server.requests
    while server.requests < before + times:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_spot_notice_is_heard_with_the_seconds_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with AwsMetadata() as server:
        notices = listening(server, monkeypatch)
        asked_again(server)
        assert notices.first() is None
        server.announce(90)
        assert notices.received.wait(20)
        found = notices.first()
        assert found
        assert found.kind == "aws-notice"
        assert 85 < found.seconds_left <= 91


def test_the_seconds_left_are_kept_within_the_clouds_longest_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    with AwsMetadata() as server:
        server.announce(100_000)
        notices = listening(server, monkeypatch)
        assert notices.received.wait(20)
        assert notices.first().seconds_left == 120.0  # type: ignore[union-attr]


def test_a_notice_that_is_over_is_said_and_ignored(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with AwsMetadata() as server:
        server.announce(-60)
        notices = listening(server, monkeypatch)
        asked_again(server)
        assert notices.first() is None
        assert "ignored: its time passed" in capsys.readouterr().out


def test_a_notice_that_ended_an_attempt_here_before_is_ignored_and_a_new_one_is_not(monkeypatch, capsys) -> None:
    with AwsMetadata() as server:
        server.announce(60)
        assert server._action
        notices = listening(server, monkeypatch, frozenset({f"aws/{server._action['time']}"}))
        asked_again(server)
        assert notices.first() is None
        assert "it ended an attempt here before" in capsys.readouterr().out
        server.announce(100)
        assert notices.received.wait(20)


def test_a_service_that_forgets_its_token_is_asked_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from skyspot.rehearsal import metadata

    with AwsMetadata() as server:
        notices = listening(server, monkeypatch)
        asked_again(server)
        monkeypatch.setattr(metadata, "_TOKEN", "another")
        server.announce(60)
        assert notices.received.wait(20)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://h:1/"}, "http://h:1"),
        ({"SKYPILOT_CLUSTER_INFO": '{"cloud": "AWS"}'}, notice.AWS_ENDPOINT),
        ({"SKYPILOT_CLUSTER_INFO": '{"cloud": "GCP"}'}, None),
        ({"SKYPILOT_CLUSTER_INFO": "not json"}, None),
    ],
)
def test_the_metadata_service_is_asked_on_its_own_cloud_alone(monkeypatch, env: dict, expected: str | None) -> None:
    for key in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "SKYPILOT_CLUSTER_INFO"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert notice.aws_endpoint() == expected


def test_a_second_signal_leaves_the_first_ones_deadline() -> None:
    code = (
        "import os, signal, time\nfrom trainer.attempt.notices import Notices\n"
        "n = Notices(10.0); n.install()\n"
        "os.kill(os.getpid(), signal.SIGTERM); first = n.first(); time.sleep(0.05)\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"
        "assert n.first() == first and n.first().kind == 'sigterm', n.first()\n"
    )
    subprocess.run([sys.executable, "-c", code], env=clean_env(), check=True)


def begin(run_dir: Path, server: AwsMetadata, *args: object) -> subprocess.Popen[str]:
    return warm.Popen(
        [sys.executable, "-m", "trainer.launch", "--processes", "1", str(PROGRAMS / "faulty.py"), "--dir", str(run_dir),
         "--constant", "attempt.ending.HOLD_PAST_DEADLINE_S=1", *map(str, args)],
        env=clean_env(**server.env(), SKYSPOT_NOTICE_POLL_S="0.05"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def test_a_noticed_attempt_saves_holds_and_is_followed_without_a_lost_step(tmp_path: Path) -> None:
    with AwsMetadata() as server:
        run_dir = tmp_path / "run"
        process = begin(run_dir, server, "--steps", 3000, "--save-every", 3000)
        with process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("step "):
                    server.announce(120)
                if "holding until this machine is taken" in line:
                    break
            assert process.poll() is None, "it holds"
            ended = event(run_dir, "end")
            os.kill(process.pid, signal.SIGTERM)
            process.stdout.read()
        assert process.returncode == 75
    assert (ended["cause"], ended["code"]) == ("notice", 75)
    assert ended["committed_step"] == ended["step"] > 0
    assert ended["notice"]["kind"] == "aws-notice"  # type: ignore[index]
    assert len(list_attempts(RunPaths(run_dir))) == 1


def test_an_attempt_that_is_noticed_before_its_first_step_holds_too(tmp_path: Path) -> None:
    """It would only be followed by another on this machine, which would take the notice for an old one."""
    with AwsMetadata() as server:
        server.announce(120)
        process = begin(tmp_path / "run", server, "--prepare", 60)
        with process:
            assert process.stdout
            for line in process.stdout:
                if "holding until this machine is taken" in line:
                    break
            assert process.poll() is None
            os.kill(process.pid, signal.SIGTERM)
            process.stdout.read()
    assert process.returncode == 75
    assert event(tmp_path / "run", "end")["cause"] == "notice"


@pytest.mark.slow
def test_a_machine_that_is_not_taken_after_all_is_left_with_75(tmp_path: Path) -> None:
    with AwsMetadata() as server:
        process = begin(tmp_path / "run", server, "--steps", 3000, "--save-every", 3000)
        with process:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("step "):
                    server.announce(15)
            assert process.wait(90) == 75
    ended = event(tmp_path / "run", "end")
    assert ended["cause"] == "notice"
    assert ended["committed_step"] == ended["step"]


IMPORTING = """
import os, signal, sys
from pathlib import Path
from trainer import RunConfig, SpotRun
assert "torch" not in sys.modules

class Taken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not run.notices.received.is_set():
            os.kill(os.getppid(), signal.SIGTERM)
            assert run.notices.received.wait(60)
            print("heard", flush=True)

sys.meta_path.insert(0, Taken())
run = SpotRun(RunConfig(checkpoint_dir=Path(sys.argv[1]), max_steps=1, global_batch_size=1, cpu=True))
with run:
    print("entered")
"""


def test_a_sigterm_while_torch_is_imported_is_heard(tmp_path: Path) -> None:
    """A cold start: in a fork of the warm process there is nothing left to import."""
    (tmp_path / "script.py").write_text(IMPORTING)
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", "--grace", "100"]
    command += [tmp_path / "script.py", tmp_path / "run"]
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines() == ["heard", "sigterm before the first step"]
    assert event(tmp_path / "run", "end")["cause"] == "signal"
