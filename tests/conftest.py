"""Fixtures that every test may use."""

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The 12 steps of tests/programs/mlp.py that nothing disturbed, by number of processes; each trained once."""
    from support import mlp

    @functools.cache
    def train(processes: int) -> Path:
        run_dir = tmp_path_factory.mktemp(f"undisturbed-{processes}") / "run"
        ended = mlp(run_dir, processes=processes)
        assert ended.code == 0, ended.output
        return run_dir

    return train


@pytest.fixture
def whole(undisturbed: Callable[[int], Path]) -> Path:
    """With one process."""
    return undisturbed(1)


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tests/programs/mlp.py that was taken at step 10, with the checkpoints of steps 4 and 8."""
    from support import mlp

    from trainer.layout import RunPaths, list_checkpoints

    run_dir = tmp_path_factory.mktemp("half") / "run"
    ended = mlp(run_dir, "--fault", "kill@10", "--commit-first")
    assert ended.code != 0, ended.output
    assert [name.step for name in list_checkpoints(RunPaths(run_dir))] == [8, 4]
    return run_dir


@pytest.fixture
def run_dir(half: Path, tmp_path: Path) -> Path:
    """A copy of the half-done run, to be damaged."""
    return Path(shutil.copytree(half, tmp_path / "run"))
