"""Ranks that another launcher started: torchrun, accelerate launch, srun, or none. Standard library only.

Every launcher but srun and mpirun sets torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). What a
launcher does with its ranks' exit codes decides whether SkyPilot can restart the job: docs/your-own-script.md has a
table.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import signal
from collections.abc import Mapping, MutableMapping
from pathlib import Path, PurePath

from trainer.launch.nodes import FIRST_PORT, PORTS
from trainer.launch.process_count import LaunchError

_PR_SET_PDEATHSIG = 1
_LAUNCHERS = {
    **dict.fromkeys(("torchrun", "torch.distributed.run", "torch.distributed.launch"), "torchrun"),
    **dict.fromkeys(("accelerate", "accelerate-launch"), "accelerate launch"),
    **dict.fromkeys(("accelerate.commands.launch", "accelerate.commands.accelerate_cli"), "accelerate launch"),
}
"""What a launcher is started as, a program or a module, and what people call it."""
_REMEDY = (
    "start the script with `python -m trainer.launch --processes N SCRIPT` instead, which sets the same variables for "
    "it and keeps the exit codes"
)
_STARTS = (
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT",
)  # fmt: skip


def supervised(env: Mapping[str, str] = os.environ) -> bool:
    """True if one launcher of ours watches all ranks of the attempt: it tells them when one leaves."""
    return "SKYSPOT_STORE_PORT" in env


def start_id(env: Mapping[str, str] = os.environ) -> str:
    """An id that all ranks of one start by another launcher share; empty if that launcher gives none."""
    return "/".join(env[name] for name in _STARTS if env.get(name))


def take_place(env: MutableMapping[str, str] = os.environ) -> str:
    """Find this process's place among the ranks, and complete torchrun's variables; returns a note for the user.

    Raises:
        LaunchError: the variables are wrong, or SkyPilot would take the launcher's exit code for a failure.
    """
    if "RANK" not in env:
        # mpirun may start its processes by way of a Slurm step with one task a node, so its variables come first.
        if (size := _started_by_mpirun(env)) > 1 and not env.get("SKYPILOT_TASK_ID"):
            raise LaunchError(
                f"mpirun started {size} processes, and each would train alone: set RANK, WORLD_SIZE, LOCAL_RANK, "
                f"MASTER_ADDR and MASTER_PORT from its variables before SpotRun, or {_REMEDY}"
            )
        _take_from_slurm(env)
    rank, size = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    if size > 1 and "RANK" not in env:  # Lightning starts its own processes so.
        raise LaunchError(f"WORLD_SIZE is {size}, but RANK is not set: {_REMEDY}")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"):
        _number(env, name, 0)
    if rank >= max(size, 1):
        raise LaunchError(f"RANK is {rank}, but WORLD_SIZE is {size}: {_REMEDY}")
    if size > 1 and not supervised(env):
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not env.get(name):
                raise LaunchError(f"WORLD_SIZE is {size}, but {name} is not set: set it, or {_REMEDY}")
        _number(env, "MASTER_PORT", 0)
    return _exit_code_note(env)


def _exit_code_note(env: Mapping[str, str]) -> str:
    """A note about a launcher that changes exit codes; empty if none does.

    Raises:
        LaunchError: SkyPilot started it, and would not restart the job.
    """
    if env.get("SKYSPOT_LINK"):
        return ""
    if launcher := parent_launcher() or ("torchrun" if env.get("TORCHELASTIC_RUN_ID") else ""):
        changes = f"{launcher} exits with 1 if a rank exits with 75, the code on which SkyPilot restarts a job"
    elif env.get("OMPI_COMM_WORLD_SIZE"):
        changes = "mpirun exits with 1 after a SIGTERM, and SkyPilot restarts a job after 75 alone"
    elif _started_by_mpirun(env):
        changes = "mpirun exits with another code if a rank is killed, and SkyPilot restarts a job after 75 alone"
    else:
        return ""
    if env.get("SKYPILOT_TASK_ID"):
        raise LaunchError(f"{changes}: {_REMEDY}")
    return f"{changes}. In a task YAML, {_REMEDY}."


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise LaunchError(f"{name}: {text!r} is not a number")
    return int(text)


def _started_by_mpirun(env: Mapping[str, str]) -> int:
    """The number of processes that mpirun started: Open MPI's, MPICH's or Intel's; 0 if none did.

    A Slurm step has PMI_SIZE too.
    """
    if env.get("OMPI_COMM_WORLD_SIZE"):
        return _number(env, "OMPI_COMM_WORLD_SIZE", 0)
    here = _number(env, "MPI_LOCALNRANKS", 0)
    return _number(env, "PMI_SIZE", here) if here or "SLURM_STEP_ID" not in env else 0


# -- srun --------------------------------------------------------------------------------------------------------------


def _take_from_slurm(env: MutableMapping[str, str]) -> None:
    """Set torchrun's variables in a task of a Slurm step, unless SkyPilot started one task on each of several nodes.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but no step.
    """
    size = _number(env, "SLURM_STEP_NUM_TASKS", 1)
    if size < 2 or _number(env, "SKYPILOT_NUM_NODES", 1) > 1:
        return
    node = _number(env, "SLURM_NODEID", 0)
    counts = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    digest = hashlib.sha256("/".join(env.get(name, "") for name in names).encode()).digest()
    env.update(
        RANK=str(_number(env, "SLURM_PROCID", 0)),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(_number(env, "SLURM_LOCALID", 0)),
        NODE_RANK=str(node),
    )
    if node < len(counts):
        env["LOCAL_WORLD_SIZE"] = str(counts[node])
    env.setdefault("MASTER_ADDR", "127.0.0.1" if len(counts) == 1 else _first_host(env.get("SLURM_STEP_NODELIST", "")))
    env.setdefault("MASTER_PORT", str(FIRST_PORT + int.from_bytes(digest[:4], "big") % PORTS))


def _tasks_per_node(text: str) -> list[int]:
    """Read SLURM_STEP_TASKS_PER_NODE: `2(x3),1` is [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def _first_host(text: str) -> str:
    """Return the first host of Slurm's list: `gpu[07-09,12],cpu1` begins with gpu07, `gpu[1-2]-ib` with gpu1-ib."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", text)
    return "".join(part or "" for part in found.groups()) if found else ""


# -- an end of the launcher --------------------------------------------------------------------------------------------


def parent_launcher() -> str:
    """Return `torchrun` or `accelerate launch` if that is this process's parent; else empty."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if "python" in PurePath(words[0]).name:
        words = [word for word in words[1:] if not word.startswith("-")]
    return _LAUNCHERS.get(PurePath(words[0]).name, "") if words else ""


def refuse_beneath_another() -> None:
    """Refuse to launch ranks in a rank of another launcher.

    Raises:
        LaunchError: torchrun or accelerate launch is this process's parent, or mpirun started several on one node.
    """
    several = _started_by_mpirun(os.environ) > 1 and _number(os.environ, "SKYPILOT_NUM_NODES", 1) == 1
    if other := parent_launcher() or ("mpirun" if several else ""):
        raise LaunchError(f"{other} has started skyspot's launcher, which starts the ranks itself: leave {other} out")


def begin(env: MutableMapping[str, str] = os.environ) -> None:
    """Prepare a process that another launcher may have started; call it before torch is imported."""
    leave_with_launcher()
    if "SKYSPOT_LINK" not in env and ("RANK" in env or "SLURM_STEP_ID" in env):
        # As our launcher does: when a peer is gone, c10d prints C++ frames around the one line with the reason.
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def leave_with_launcher() -> None:
    """Have the kernel send this process SIGTERM when torchrun or accelerate launch, its parent, is gone.

    With one process, accelerate launch passes no signal on; torchrun passes on none if it is killed.
    """
    parent = os.getppid()
    if not parent_launcher():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            signal.raise_signal(signal.SIGTERM)
