"""Starts Python programs without their imports: like `subprocess`, but as forks of a process that has imported all.

    done = warm.run([sys.executable, "-m", "trainer.launch", "script.py"], capture_output=True, env=clean_env())

`nursery.py` is that process: one for each pytest worker, started when it is first needed. Programs that a fork cannot
imitate are started cold; see `needs_a_cold_start`. A test of the start itself uses `subprocess`, and says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import shared

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
IMPORTED = {
    "torch", "accelerate", "transformers", "numpy", "safetensors", "xxhash", "huggingface_hub", "tokenizers",
    "datasets", "pandas", "pyarrow", "peft",
}  # fmt: skip
# Libraries read these when they are imported, which was before the fork.
READ_AT_IMPORT = (
    "PYTHON", "LD_", "LC_", "LANG", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "ACCELERATE_", "TORCH", "PYTORCH_", "MKL_",
    "KMP_", "XDG_CACHE_HOME", "TOKENIZERS_",
)  # fmt: skip
# A fork can still apply these, or they change no result.
FOLLOWED = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONFAULTHANDLER", "TORCH_CPP_LOG_LEVEL")
LOADED_WITH = {**os.environ, "HF_HUB_OFFLINE": "1"}
_PR_SET_CHILD_SUBREAPER = 36
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Program:
    """The program that a fork becomes."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    descriptors: list[int]
    """The descriptors' numbers in the child."""
    new_session: bool


def needs_a_cold_start(argv: Sequence[str], env: Mapping[str, str], cwd: str) -> str:
    """The reason why a program cannot be forked; empty if it can."""
    if sys.platform != "linux":
        return "forks are made on Linux alone"
    if len(argv) < 2 or argv[0] != sys.executable:
        return "not this Python"
    if argv[1] == "-m" and len(argv) > 2 and argv[2].partition(".")[0] == "trainer":
        first = Path(cwd)
    elif not argv[1].startswith("-") and Path(cwd, argv[1]).is_file():
        first = Path(cwd, argv[1]).resolve().parent
    else:
        return "not a module of the trainer's, and not a script"
    if _read_at_import(env) != _read_at_import(LOADED_WITH) or env.get("TORCH_CPP_LOG_LEVEL", "ERROR") != "ERROR":
        return "a variable that is read at import"
    for folder in (first, *map(Path, filter(None, env.get("PYTHONPATH", "").split(os.pathsep)))):
        if folder != REPO and (name := _hides(folder)):
            return f"{folder / name} hides what is imported"
    return ""


def _read_at_import(env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] for name in env if name.startswith(READ_AT_IMPORT) and name not in FOLLOWED}


def _hides(folder: Path) -> str:
    """A module in a folder of the search path that would be imported instead of an installed one."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            name = path.stem if path.suffix in (".py", ".pth") else path.name
            if name in IMPORTED or name in ("sitecustomize", "usercustomize") or name in sys.stdlib_module_names:
                return path.name
    return ""


class ForkedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen`, but forks whatever it can."""

    def fork(self, program: Program, sources: Sequence[int], before: Callable[[], None] | None) -> int | None:
        """Start the program; returns its process id, or None if it must be started cold.

        Args:
            program: The program that the fork becomes.
            sources: Our descriptors to pass on, as many as `program.descriptors`.
            before: Called first in the fork.
        """
        raise NotImplementedError

    def _execute_child(self, *args: Any) -> None:
        given = dict(_SIGNATURE.bind(self, *args).arguments)
        argv, cwd = given["args"], os.fspath(given["cwd"] or Path.cwd())
        argv = [argv] if isinstance(argv, str | bytes | os.PathLike) else list(argv)
        env = dict(os.environ if given["env"] is None else given["env"])
        argv = [os.fsdecode(part) for part in argv]
        env = {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}
        plain = (
            given["executable"] is None and given["close_fds"] and not given["shell"] and given["umask"] == -1
            and given["gid"] is given["gids"] is given["uid"] is None and given.get("process_group", -1) == -1
        )  # fmt: skip
        if plain and not needs_a_cold_start(argv, env, cwd):
            ours = (given["p2cread"], given["c2pwrite"], given["errwrite"])
            sources = [number if end == -1 else end for number, end in enumerate(ours)]
            passed = sorted(given["pass_fds"])
            program = Program(argv, env, cwd, [0, 1, 2, *passed], given["start_new_session"])
            pid = self.fork(program, [*sources, *passed], given["preexec_fn"])
            if pid is not None:
                self.pid, self._child_created = pid, True
                self._close_ends_of_the_child(given)
                return
        super()._execute_child(*args)  # type: ignore[misc]

    def _close_ends_of_the_child(self, given: dict[str, Any]) -> None:
        """Close the child's ends of the pipes, as `subprocess` does after its own fork."""
        devnull = getattr(self, "_devnull", None)
        for theirs, mine in (("p2cread", "p2cwrite"), ("c2pwrite", "c2pread"), ("errwrite", "errread")):
            if given[theirs] != -1 and given[mine] != -1 and given[theirs] != devnull:
                os.close(given[theirs])
        if devnull is not None:
            os.close(devnull)
        self._closed_child_pipe_fds = True


class Nursery:
    """The process that forks, seen from pytest."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        env = {
            name: value for name, value in LOADED_WITH.items() if not name.startswith(("OMP_", "GOMP_", "PYTHONPATH"))
        }
        # As the launcher starts a rank, and without threads of numpy and pyarrow.
        env.update(GOMP_SPINCOUNT="5000", TORCH_CPP_LOG_LEVEL="ERROR", OPENBLAS_NUM_THREADS="1")
        env["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "nursery.py", str(theirs.fileno())], env=env, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=self._errors, stderr=self._errors,
        )  # fmt: skip
        theirs.close()
        self._lock = threading.Lock()
        self._libc = ctypes.CDLL(None)
        self._answer()

    def start(self, program: Program, sources: Sequence[int]) -> int:
        """Fork a program as a child of this very process, with our descriptors `sources`; returns its process id."""
        request = json.dumps(asdict(program)).encode()
        with self._lock:
            # The program is forked twice. The nearest ancestor that is a subreaper adopts the second fork: we do.
            self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._control, [len(request).to_bytes(8, "big")], list(sources))
                self._control.sendall(request)
                pid = self._answer()
            finally:
                self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # Raises unless it is our child.
        return pid

    def _answer(self) -> int:
        """Wait for a number that it sends."""
        answer = self._control.recv(8, socket.MSG_WAITALL)
        if len(answer) < 8:
            self._errors.seek(0)
            raise RuntimeError(f"the warm process is gone: {self._errors.read().decode(errors='replace')}")
        return int.from_bytes(answer, "big")

    def close(self) -> None:
        """End it; the programs that it forked are not its children and continue."""
        self._control.close()
        self._process.wait()
        self._errors.close()


_nursery: Nursery | None = None
_beginning = threading.Lock()


def nursery() -> Nursery:
    """This process's nursery, started at the first call."""
    global _nursery
    with _beginning:
        if not _nursery:
            with shared.not_counted():
                _nursery = Nursery()
        return _nursery


def close() -> None:
    """End the warm process, if there is one."""
    global _nursery
    with _beginning:
        if _nursery:
            _nursery.close()
        _nursery = None


class Popen(ForkedPopen):
    """`subprocess.Popen` for tests: a fork of the warm process where the result is the same, else a cold start."""

    def fork(self, program: Program, sources: Sequence[int], before: Callable[[], None] | None) -> int | None:
        return None if before else nursery().start(program, sources)


def run(
    command: Sequence[object], *, capture_output: bool = False, timeout: float | None = None, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Do what `subprocess.run` does, with `Popen`."""
    if capture_output:
        options.update(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command = [part if isinstance(part, os.PathLike) else str(part) for part in command]
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
