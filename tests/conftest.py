"""Fixtures that every test may use."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import faultfs

sys.path.insert(0, str(Path(__file__).parent))
import budget
import longest_first
import shared
import skips
from clock import Clock


def pytest_configure(config: pytest.Config) -> None:
    """Report skipped tests; in the processes that run tests, also order them, and check how long each takes."""
    config.pluginmanager.register(skips)
    config.pluginmanager.register(longest_first)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        watched = budget.Budget(budget.QuietClock())
        config.pluginmanager.register(watched)
        shared.not_counted = watched.building


@contextmanager
def same_environment() -> Iterator[None]:
    """Restore the environment and the umask at the end: what a test leaves behind can steer later programs."""
    kept, mask = dict(os.environ), os.umask(0o077)
    os.umask(mask)
    yield
    os.umask(mask)
    if dict(os.environ) != kept:
        os.environ.clear()
        os.environ.update(kept)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A monotonic clock that the test sets."""
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restore the environment after each test."""
    with same_environment():
        os.environ["SKYSPOT_CLOUD"] = "none"  # The machine that runs the tests may belong to a cloud.
        yield


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers have a minute at a stop: on a slow machine their imports alone take seconds."""
    from trainer.trackers import tracking

    monkeypatch.setattr(tracking, "STOPPED_S", 60.0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """Restore it after shared fixtures too: torch, for example, sets a variable for its cache."""
    if fixturedef.scope == "function":
        return (yield)
    with same_environment():
        return (yield)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Undisturbed runs of tests/programs/mlp.py (12 steps), by number of processes; each is trained once."""
    from support import mlp

    @functools.cache
    def train(processes: int) -> Path:
        def build(folder: Path) -> None:
            ended = mlp(folder / "run", processes=processes)
            assert ended.code == 0, ended.output

        return shared.built_once(tmp_path_factory, f"undisturbed-{processes}", build) / "run"

    return train


@pytest.fixture
def whole(undisturbed: Callable[[int], Path]) -> Path:
    """The undisturbed run with one process."""
    return undisturbed(1)


@pytest.fixture
def faults(tmp_path: Path) -> Iterator["faultfs.Client"]:
    """A file system that fails or hangs on request, mounted over tmp_path / "behind"."""
    import faultfs

    if reason := faultfs.missing():
        pytest.skip(reason)
    (tmp_path / "behind").mkdir()
    with faultfs.mounted(tmp_path / "behind", tmp_path / "m") as client:
        yield client


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tests/programs/mlp.py that was killed at step 10, with checkpoints of steps 4 and 8."""
    from support import mlp

    from trainer.layout.names import RunPaths, list_checkpoints

    def build(folder: Path) -> None:
        ended = mlp(folder / "run", "--fault", "kill@10", "--commit-first")
        assert ended.code != 0, ended.output
        assert [name.step for name in list_checkpoints(RunPaths(folder / "run"))] == [8, 4]

    return shared.built_once(tmp_path_factory, "half", build) / "run"


@pytest.fixture
def run_dir(half: Path, tmp_path: Path) -> Path:
    """A copy of the half-done run, for a test to damage."""
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a real S3 server on loopback serves as the bucket `mine`."""
    folder = tmp_path / "store" / "mine"
    folder.mkdir(parents=True)
    rclone = Path(sys.executable).parent / "rclone"
    server = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", "accesskey1,secretkey12345",
         "--config", "/dev/null", "--dir-cache-time", "0s", folder.parent],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stderr
    while "Starting s3 server" not in (line := server.stderr.readline()):
        assert line, "the S3 server did not start"
    address = line.split("[http://")[1].split("/")[0]
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{address}"),
        ("AWS_ACCESS_KEY_ID", "accesskey1"),
        ("AWS_SECRET_ACCESS_KEY", "secretkey12345"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    yield folder
    server.kill()
    server.communicate()


def pytest_unconfigure() -> None:
    """End the process from which warm programs were forked."""
    if warm := sys.modules.get("warm"):
        warm.close()
