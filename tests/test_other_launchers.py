"""Ranks that another launcher starts: torchrun, accelerate launch, srun, or a shell that sets the variables."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import shared
import warm
from support import PROGRAMS, Ended, clean_env, column, event, launch, losses, weights

from trainer.launch import others
from trainer.launch.process_count import LaunchError

SCRIPT = PROGRAMS / "launched.py"
PORT = "PORT"
"""In a launcher's words: a port that is free when it starts."""


def free_port() -> str:
    """A port below those that the system gives to connections."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


def with_port(launcher: list[str]) -> list[str]:
    return [free_port() if word == PORT else word for word in launcher]


def through(launcher: list[str], run_dir: Path, *args: object, **env: str) -> Ended:
    """One attempt through another launcher, to the end of all its processes: they hold the pipe of the output."""
    command = [sys.executable, "-m", *with_port(launcher), str(SCRIPT), "--dir", str(run_dir), *map(str, args)]
    done = subprocess.run(
        command, env=clean_env(OMP_NUM_THREADS="1", **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=150,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout)


def torchrun(processes: int = 2) -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def accelerate(processes: int) -> list[str]:
    several = "--multi_gpu" if processes > 1 else "--cpu"  # With --cpu it starts one process, whatever else it is told.
    options = [several, "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", PORT]
    return ["accelerate.commands.launch", *options, "--mixed_precision", "no", "--dynamo_backend", "no"]


def side_by_side(environments: list[dict[str, str]], run_dir: Path, *args: object) -> list[Ended]:
    """One attempt of processes that nobody watches."""
    command = [sys.executable, str(SCRIPT), "--dir", str(run_dir), *map(str, args)]
    started = [
        warm.Popen(
            command, env=clean_env(OMP_NUM_THREADS="1", **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for env in environments
    ]  # fmt: skip
    return [Ended(process.wait(150), process.communicate()[0]) for process in started]


def plain() -> list[dict[str, str]]:
    port = free_port()
    return [
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for rank in range(2)
    ]


def slurm(**more: str) -> list[dict[str, str]]:
    step = {
        "SLURM_JOB_ID": str(secrets.randbelow(10**6)), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "gpu07", **more,
    }  # fmt: skip
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"} for rank in range(2)]
    return [{**step, **place} for place in places]


def undisturbed(factory: pytest.TempPathFactory) -> Path:
    def build(empty: Path) -> None:
        done = launch(SCRIPT, "--dir", empty / "run", processes=2)
        assert done.code == 0, done.output

    return shared.built_once(factory, "launched", build) / "run"


def codes(ended: list[Ended]) -> list[int]:
    return [one.code for one in ended]


@pytest.mark.slow
@pytest.mark.parametrize("group", ["inside", "before"])
def test_a_run_goes_on_under_every_launcher(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, group: str
) -> None:
    whole, run_dir = undisturbed(tmp_path_factory), tmp_path / "run"
    first = side_by_side(plain(), run_dir, "--group", group, "--strike", "5:SIGTERM")
    assert codes(first) == [75, 75], first
    assert event(run_dir, "end")["committed_step"] == 5, "no step is lost"
    killed = side_by_side(plain(), run_dir, "--group", group, "--strike", "8:SIGKILL")
    assert codes(killed) == [-9, 75], killed
    if group == "inside":
        done = side_by_side(slurm(), run_dir)
    else:
        done = [through(torchrun(), run_dir, "--group", group)]
        assert "torchrun exits with 1 if a rank exits with 75" in done[0].output
        assert "python -m trainer.launch --processes N SCRIPT" in done[0].output
    assert set(codes(done)) == {0}, done
    assert losses(run_dir) == losses(whole)
    assert sorted(losses(whole)) == list(range(1, 13))
    assert weights(run_dir) == weights(whole)


@pytest.mark.parametrize(
    ("launcher", "processes", "code"),
    [
        pytest.param(torchrun(), 2, 1, id="torchrun", marks=pytest.mark.slow),
        pytest.param(accelerate(1), 1, -signal.SIGTERM, id="accelerate-1"),
        pytest.param(accelerate(2), 2, 1, id="accelerate-2", marks=pytest.mark.slow),
    ],
)
def test_a_launcher_that_is_told_to_stop_loses_no_step_and_leaves_no_orphan(
    tmp_path: Path, launcher: list[str], processes: int, code: int
) -> None:
    ended = through(launcher, tmp_path / "run", "--strike", "5:kill LAUNCHER")
    assert set(column(tmp_path / "run", "world_size")) == {processes}, ended.output
    assert "finished" not in ended.output
    assert event(tmp_path / "run", "end").get("cause") == "signal", ended.output
    assert event(tmp_path / "run", "end")["committed_step"] == 5
    assert ended.code == code, "which is why it is refused where SkyPilot looks at the code"


def test_accelerate_launch_of_one_process_replaces_its_exit_code(tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser, simple_launcher

    (script := tmp_path / "train.py").write_text("raise SystemExit(75)\n")
    words = [*with_port(accelerate(1))[1:], str(script)]
    with pytest.raises(subprocess.CalledProcessError) as raised:  # Of which nobody is aware: Python exits with 1.
        simple_launcher(launch_command_parser().parse_args(words))
    assert raised.value.returncode == 75


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun(), accelerate(1)], ids=["torchrun", "accelerate"])
def test_a_launcher_that_loses_exit_codes_is_refused_where_skypilot_looks_at_them(
    tmp_path: Path, launcher: list[str]
) -> None:
    ended = through(launcher, tmp_path / "run", SKYPILOT_TASK_ID="a-task")
    assert ended.code == 1
    errors = [line for line in ended.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, "one rank says it"
    assert "exits with 1 if a rank exits with 75" in errors[0]
    assert "python -m trainer.launch --processes N SCRIPT" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # On several machines it is the same code: test_nodes.py.
def test_an_error_of_one_rank_is_no_preemption_to_the_others(tmp_path: Path) -> None:
    ended = side_by_side(plain(), tmp_path / "run", "--fails")
    assert codes(ended) == [1, 1], ended
    assert "ValueError: a bug of rank 1" in ended[1].output
    assert event(tmp_path / "run", "end")["cause"] == "peer-crashed"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "http"}, "MASTER_PORT: 'http' is not"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is 1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK: 'one' is not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 2 processes"),
        # MPICH's and Intel's; MPICH's with -pmi-port; MPICH's gforker.
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1"}, "mpirun started 2 processes"),
        ({"PMI_PORT": "gpu07:45031", "MPI_LOCALNRANKS": "2"}, "mpirun started 2 processes"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun started 2 processes"),
        (  # By way of a step that mpirun made in an allocation.
            {"PMI_SIZE": "8", "MPI_LOCALNRANKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "mpirun started 8 processes",
        ),
    ],
)
def test_wrong_variables_are_named_with_the_remedy(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as refused:
        others.take_place(env)
    assert message in str(refused.value)


def test_the_variables_of_a_slurm_step_become_torchruns() -> None:
    env = slurm(
        SLURM_JOB_ID="17", SLURM_STEP_NUM_TASKS="5", SLURM_STEP_TASKS_PER_NODE="2(x2),1",
        SLURM_STEP_NODELIST="gpu[07-09],cpu1", PMI_SIZE="5",
    )[1]  # fmt: skip
    env.update(SLURM_PROCID="3", SLURM_NODEID="1")
    assert others.take_place(env) == ""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")
    assert [env[name] for name in names] == ["3", "5", "1", "2", "1", "gpu07"]
    port = env["MASTER_PORT"]
    again = slurm(SLURM_JOB_ID="17")[0]
    others.take_place(again)
    assert (again["MASTER_ADDR"], again["MASTER_PORT"]) == ("127.0.0.1", port), "all ranks of a step meet at one port"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu07", "gpu07"), ("gpu[1-2]-ib,x", "gpu1-ib"), ("n[3,5-7]", "n3"), ("a-b-1,c", "a-b-1"), ("", "")],
)
def test_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    assert others._first_host(hosts) == first


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # A batch script.
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SKYPILOT_NUM_NODES": "2"},  # SkyPilot's own step.
    ],
)
def test_one_process_under_slurm_trains_alone(env: dict[str, str]) -> None:
    before = dict(env)
    others.take_place(env)
    assert env == before


@pytest.mark.parametrize(("env", "is_quiet"), [(plain()[0], True), (slurm()[0], True), ({}, False)])
def test_a_lost_peer_prints_no_frames_of_c10ds(env: dict[str, str], is_quiet: bool) -> None:
    others.begin(env)
    assert (env.get("TORCH_CPP_LOG_LEVEL") == "ERROR") == is_quiet


@pytest.mark.parametrize(
    ("launcher", "env", "changes"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "none"}, "exits with 1 if a rank exits with 75"),
        ("accelerate launch", {}, "exits with 1 if a rank exits with 75"),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "1"}, "exits with 1 after a SIGTERM"),
        ("mpirun", {"PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}, "exits with another code if a rank is killed"),
        (
            "mpirun",
            {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"} | plain()[0],
            "exits with another code if a rank is killed",
        ),
    ],
    ids=["torchrun", "accelerate", "open-mpi", "mpich-1", "mpich-2"],
)
def test_a_launcher_that_loses_exit_codes_is_told_of_and_refused_under_skypilot(
    monkeypatch: pytest.MonkeyPatch, launcher: str, env: dict[str, str], changes: str
) -> None:
    monkeypatch.setattr(others, "parent_launcher", lambda: "" if env else launcher)
    changes = f"{launcher} {changes}"
    assert others.take_place(dict(env)).startswith(changes)
    with pytest.raises(LaunchError, match=changes):
        others.take_place({**env, "SKYPILOT_TASK_ID": "a-task"})
    assert others.take_place({**env, "SKYPILOT_TASK_ID": "a-task", "SKYSPOT_LINK": "3,4,5"}) == ""


@pytest.mark.slow
def test_skyspots_launcher_is_refused_beneath_another(tmp_path: Path) -> None:
    command = [sys.executable, "-m", *with_port(accelerate(1)), "-m", "trainer.launch", str(SCRIPT)]
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "Error: accelerate launch has started skyspot's launcher" in done.stderr


def test_skyspots_launcher_is_refused_where_mpirun_starts_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"})
    with pytest.raises(LaunchError, match="mpirun has started skyspot's launcher, which starts the ranks itself"):
        others.refuse_beneath_another()
    os.environ["SKYPILOT_NUM_NODES"] = "2"  # One launcher on each node.
    others.refuse_beneath_another()


def words_of_parent(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(Path, "read_bytes", lambda self: "\0".join((*words, "")).encode())
    return others.parent_launcher()


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        (["/usr/bin/python3", "/usr/local/bin/torchrun", "train.py"], "torchrun"),
        (["python", "-m", "torch.distributed.run", "train.py"], "torchrun"),
        (["/venv/bin/python3.11", "/venv/bin/accelerate", "launch", "train.py"], "accelerate launch"),
        (["python", "-m", "accelerate.commands.launch", "train.py"], "accelerate launch"),
        (["python", "/venv/bin/accelerate-launch", "train.py"], "accelerate launch"),
        (["python", "-u", "-m", "torch.distributed.run", "train.py"], "torchrun"),
        (["python", "accelerate.py"], ""), (["python", "accelerate-train.py"], ""), (["python", "-c", "1"], ""),
        (["python", "train.py"], ""), (["bash", "-c", "torchrun train.py"], ""), (["python"], ""), ([""], ""),
    ],
)  # fmt: skip
def test_a_launcher_is_known_by_its_command_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], launcher: str
) -> None:
    assert words_of_parent(monkeypatch, *words) == launcher


@pytest.mark.slow
def test_a_group_of_other_ranks_than_the_variables_is_refused(tmp_path: Path) -> None:
    body = (
        "from trainer import SpotRun\nimport torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo', init_method='tcp://127.0.0.1:{port}', rank={rank}, world_size=2)\n"
        "with SpotRun(r'{folder}') as run: run.register(model=torch.nn.Linear(1, 1))\n"
    )
    script, port = tmp_path / "train.py", free_port()
    started: list[Any] = []
    for rank in range(2):
        script.write_text(body.format(port=port, rank=rank, folder=tmp_path / f"run{rank}"))
        command = [sys.executable, str(script.rename(tmp_path / f"train{rank}.py"))]
        started.append(warm.Popen(command, env=clean_env(), stderr=subprocess.PIPE, text=True))
    for rank, process in enumerate(started):
        error = process.communicate(timeout=100)[1]
        assert process.returncode == 1
        assert f"torch.distributed counts this process as rank {rank} of 2, but RANK and WORLD_SIZE say" in error
        assert "Traceback" not in error


def test_these_tests_start_no_process_beneath_a_launcher() -> None:
    assert not others.parent_launcher(), os.getppid()
