"""A run under srun itself, on a Slurm of this test's own, and under Open MPI's mpirun."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import two_nodes
from needs import NOT_HERE
from support import Ended, clean_env, event, losses, weights
from test_other_launchers import SCRIPT, free_port, undisturbed

LIMIT_S = 600
pytestmark = pytest.mark.slow  # Each attempt's processes import torch anew: their launchers start them.


def program(run_dir: Path, strike: str = "0:SIGKILL") -> list[str]:
    return [sys.executable, str(SCRIPT), "--dir", str(run_dir), "--strike", strike]


def finished(command: list[str], env: dict[str, str]) -> Ended:
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S
    )
    return Ended(done.returncode, done.stdout)


def test_a_run_goes_on_under_srun_whoever_ends_its_step(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole, run_dir = undisturbed(tmp_path_factory), tmp_path / "run"
    (logs := tmp_path / "slurm").mkdir()
    with two_nodes.slurm(logs) as inside:

        def srun(nodes: int, *args: str) -> Ended:
            step = ["sh", "-c", 'export SRUN=$$; exec srun "$@"', "srun", "-N", str(nodes), "-n", "2"]
            return finished([*inside, *step, *program(run_dir, *args)], two_nodes.environment())

        stopped = srun(1, "5:scancel $SLURM_JOB_ID")
        assert stopped.code == 75, stopped.output
        assert event(run_dir, "end")["cause"] == "signal"
        assert event(run_dir, "end")["committed_step"] == 5, "no step is lost"
        killed = srun(2, "8:kill $SRUN")
        assert killed.code == 137, killed.output
        assert "resumed at step 5" in killed.output
        done = srun(1)
        assert done.code == 0, done.output
    assert losses(run_dir) == losses(whole)
    assert weights(run_dir) == weights(whole)


def mpirun(run_dir: Path, *args: str, sets: bool = True) -> Ended:
    """One attempt of two processes that mpirun starts; each sets torchrun's variables from mpirun's."""
    if shutil.which("mpirun") is None:
        pytest.skip(f"a run under mpirun: {NOT_HERE}: mpirun is not installed, as `make e2e` does")
    variables = (
        "export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK "
        f'MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}; exec "$@"'
    )
    words = ["sh", "-c", variables, "rank"] if sets else []
    return finished(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", *words, *program(run_dir, *args)],
        clean_env(OMP_NUM_THREADS="1"),
    )


def test_mpirun_keeps_a_ranks_exit_code_but_not_after_its_own_sigterm(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stopped = mpirun(run_dir, "5:SIGTERM")
    assert stopped.code == 75, stopped.output
    assert event(run_dir, "end")["committed_step"] == 5, "no step is lost"
    assert "mpirun exits with 1 after a SIGTERM" in stopped.output
    ended = mpirun(run_dir, "8:kill LAUNCHER")
    assert "resumed at step 5" in ended.output
    assert ended.code == 1, "which is why it is refused where SkyPilot looks at the code"


def test_processes_that_mpirun_starts_without_torchruns_variables_are_refused(tmp_path: Path) -> None:
    refused = mpirun(tmp_path / "run", sets=False)
    assert refused.code == 1
    errors = {line for line in refused.output.splitlines() if line.startswith("Error: ")}
    assert len(errors) == 1, refused.output
    assert "mpirun started 2 processes, and each would train alone" in errors.pop()
    assert not (tmp_path / "run").exists()
