"""A run under srun itself, on a Slurm of this test's own, and under mpirun: Open MPI's and MPICH's."""

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
        highest = finished(
            [*inside, "srun", "-n", "2", "sh", "-c", "exit $((75 - SLURM_PROCID))"], two_nodes.environment()
        )
        assert highest.code == 75, highest.output
    assert losses(run_dir) == losses(whole)
    assert weights(run_dir) == weights(whole)


OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
"""The variables that it sets: rank, size, rank on the node."""


def mpirun(command: list[str], run_dir: Path, *args: str, names: tuple[str, str, str] | None = None) -> Ended:
    """One attempt of two processes that mpirun starts; with names, each sets torchrun's variables from mpirun's."""
    words = []
    if names:
        values = zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), names, strict=True)
        variables = " ".join(f"{ours}=${theirs}" for ours, theirs in values)
        group = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}"
        words = ["sh", "-c", f'export {variables} {group}; exec "$@"', "rank"]
    started = ["sh", "-c", 'export MPIRUN=$$; exec "$@"', "mpirun", *command, "-n", "2"]
    return finished([*started, *words, *program(run_dir, *args)], clean_env(OMP_NUM_THREADS="1"))


def refused(ended: Ended, run_dir: Path) -> bool:
    errors = {line for line in ended.output.splitlines() if line.startswith("Error: ")}
    assert len(errors) == 1, ended.output
    assert "mpirun started 2 processes, and each would train alone" in errors.pop()
    return ended.code == 1 and not run_dir.exists()


@pytest.fixture
def open_mpi() -> list[str]:
    """Open MPI's mpirun."""
    if shutil.which("mpirun") is None:
        pytest.skip(f"a run under mpirun: {NOT_HERE}: mpirun is not installed, as `make e2e` does")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe"]


@pytest.fixture
def mpich(tmp_path: Path) -> list[str]:
    """MPICH's mpirun, installed for this test alone."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--prefix", tmp_path / "mpich"]
    got = subprocess.run([*install, "--retries", "1", "mpich==5.0.2"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"pip cannot install mpich: {got.stderr.strip()[-200:]}")
    return [str(tmp_path / "mpich" / "bin" / "mpirun")]


def test_mpirun_keeps_a_ranks_exit_code_but_not_after_its_own_sigterm(tmp_path: Path, open_mpi: list[str]) -> None:
    run_dir = tmp_path / "run"
    stopped = mpirun(open_mpi, run_dir, "5:SIGTERM", names=OPEN_MPI)
    assert stopped.code == 75, stopped.output
    assert event(run_dir, "end")["committed_step"] == 5, "no step is lost"
    assert "mpirun exits with 1 after a SIGTERM" in stopped.output
    ended = mpirun(open_mpi, run_dir, "8:kill $MPIRUN", names=OPEN_MPI)
    assert "resumed at step 5" in ended.output
    assert ended.code == 1, "which is why it is refused where SkyPilot looks at the code"


def test_processes_that_mpirun_starts_without_torchruns_variables_are_refused(
    tmp_path: Path, open_mpi: list[str]
) -> None:
    assert refused(mpirun(open_mpi, tmp_path / "run"), tmp_path / "run")


def test_mpichs_mpirun_passes_a_sigterm_on_and_has_exit_codes_of_its_own(tmp_path: Path, mpich: list[str]) -> None:
    run_dir = tmp_path / "run"
    assert refused(mpirun(mpich, run_dir), run_dir)
    stopped = mpirun(mpich, run_dir, "5:kill $MPIRUN", names=MPICH)
    assert stopped.code == 75, stopped.output
    assert event(run_dir, "end")["committed_step"] == 5, "no step is lost"
    assert "mpirun exits with another code if a rank is killed" in stopped.output
    # Why it is refused where SkyPilot looks at the code: 9, or 255 where mpiexec itself fails an assertion meanwhile.
    killed = finished([*mpich, "-n", "2", "sh", "-c", "[ $PMI_RANK = 0 ] || exec sleep 600; kill -9 $$"], clean_env())
    assert killed.code in (9, 255), killed.output
    joined = finished([*mpich, "-n", "2", "sh", "-c", "[ $PMI_RANK = 0 ] || exit 4; exit 75"], clean_env())
    assert joined.code == 79, joined.output
