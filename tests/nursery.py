"""The process from which warm programs are forked: it has imported torch and the trainer, but used neither.

    python tests/nursery.py DESCRIPTOR        a socket on which `warm.Nursery` requests programs

A start of the trainer costs seconds of imports, and the tests start it hundreds of times. This process imports
everything once and stays single-threaded. For each requested program it forks a child, which becomes what `python -m
MODULE` or `python SCRIPT` would have been: arguments, environment, working folder, descriptors, signal handlers, output
buffers, `__main__`, search path, threads and random seeds are those of a fresh interpreter. A launcher that was started
this way forks its ranks and its sidecar from itself, and stays their parent. `test_warm.py` compares all of that with
cold starts.

One difference remains: all programs of a pytest worker share one seed of Python's string hashes.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import NoReturn

from warm import REPO, ForkedPopen, Program

LAUNCHERS = ("trainer", "trainer.launch")
LIBRARIES = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "accelerate", "transformers", "safetensors.torch",
    "transformers.models.llama.modeling_llama", "numpy.random",
)  # fmt: skip
INSTALLED = sys.path[1:]
HOME = Path.home()


def load() -> None:
    """Import everything that an attempt imports, from its start to its end."""
    sys.path.insert(0, str(REPO))
    for name in LIBRARIES:
        importlib.import_module(name)
    for path in sorted((REPO / "trainer").rglob("*.py")):
        # trainer.hf imports transformers' Trainer, and with it datasets and peft. Tests bring another lightning.
        if path.stem not in ("__main__", "lightning"):
            name = ".".join(path.relative_to(REPO).with_suffix("").parts)
            importlib.import_module(name.removesuffix(".__init__"))
    import torch

    torch.optim.AdamW([torch.nn.Parameter(torch.empty(0))])  # Its own imports happen at its first use.
    if (threads := len(os.listdir("/proc/self/task"))) > 1:  # noqa: PTH208
        sys.exit(f"{threads} threads after the imports: their locks would not survive a fork")
    gc.collect()
    gc.freeze()


def serve(control: socket.socket) -> None:
    """Send the process id to show that it is ready; then fork a program for each request, until the socket closes."""
    control.sendall(os.getpid().to_bytes(8, "big"))
    while True:
        request, sources = received(control)
        if not request:
            return
        program = Program(**json.loads(request))
        (adopted, adopt), (told, tell) = os.pipe(), os.pipe()
        between = os.fork()
        if not between:
            # Forked twice: once the first fork has ended, the requesting process adopts the second as its child.
            child = os.fork()
            if child:
                os.write(tell, child.to_bytes(8, "big"))
                os._exit(0)
            os.close(adopt)
            os.read(adopted, 1)
            control.detach()
            signal.signal(signal.SIGINT, _SIGINT)
            become(program, sources)
        os.waitpid(between, 0)
        control.sendall(os.read(told, 8))
        for descriptor in (adopt, adopted, told, tell, *sources):
            os.close(descriptor)


def received(control: socket.socket) -> tuple[bytes, list[int]]:
    """A request and the descriptors that came with it; empty once the socket is closed."""
    head, sources, _, _ = socket.recv_fds(control, 8, 64)
    length, request = int.from_bytes(head, "big"), b""
    while len(request) < length:
        request += control.recv(length - len(request))
    return request, sources


class LaunchersPopen(ForkedPopen):
    """`subprocess.Popen` in a forked launcher: starts ranks and sidecar as forks of the launcher."""

    def fork(self, program: Program, sources: Sequence[int], before: Callable[[], None] | None) -> int | None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The threads that it is about relay output and hold no lock.
            pid = os.fork()
        if not pid:
            become(program, sources, before, blocked)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return pid


def become(
    program: Program,
    sources: Sequence[int],
    before: Callable[[], None] | None = None,
    mask: set[signal.Signals] | None = None,
) -> NoReturn:
    """Become the program, in a fork; never returns."""
    code = 70
    try:
        _take_descriptors(program.descriptors, sources)
        _reset_signals()
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if program.new_session:
            os.setsid()
        os.chdir(program.cwd)
        if before:
            before()
        _be_fresh(program)
        code = _run(program.argv)
        code = _finish(code)
    finally:
        os._exit(code)


def _take_descriptors(targets: Sequence[int], sources: Sequence[int]) -> None:
    """Give the source descriptors the targets' numbers, and close all others."""
    import fcntl

    above = 1 + max(*targets, *sources)
    moved = [fcntl.fcntl(source, fcntl.F_DUPFD, above) for source in sources]
    for target, source in zip(targets, moved, strict=True):
        os.dup2(source, target, inheritable=True)
    # fmt: off
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if descriptor not in targets:
            with suppress(OSError):
                os.close(descriptor)
    # fmt: on


_SIGINT: signal.Handlers = signal.SIG_DFL
"""The SIGINT handler that a program starts with; a shell's background job ignores SIGINT."""


def _reset_signals() -> None:
    """Reset signal handlers as in a fresh interpreter; ignored signals stay ignored."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _be_fresh(program: Program) -> None:
    """Set the state of interpreter and libraries as arguments and environment demand."""
    argv, env = program.argv, program.env
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.orig_argv = argv
    as_module = argv[1] == "-m"
    first = program.cwd if as_module else str(Path(argv[1]).resolve().parent)
    sys.argv = ["-m", *argv[3:]] if as_module else argv[1:]
    asked = list(filter(None, env.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:] = [first, *asked, *(entry for entry in INSTALLED if entry not in asked)]
    importlib.invalidate_caches()
    found = PathFinder.find_spec("trainer")
    if not found or found.origin != str(REPO / "trainer" / "__init__.py"):
        for name in [name for name in sys.modules if name.partition(".")[0] == "trainer"]:
            del sys.modules[name]  # The program finds another copy of it first.
    buffered = not env.get("PYTHONUNBUFFERED")
    sys.stdin = sys.__stdin__ = _stream(0, sys.__stdin__, buffered)
    sys.stdout = sys.__stdout__ = _stream(1, sys.__stdout__, buffered)
    sys.stderr = sys.__stderr__ = _stream(2, sys.__stderr__, buffered)
    tempfile.tempdir = None
    if Path.home() != HOME:
        _follow_home()
    import numpy as np
    import torch

    torch.default_generator.seed()
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    if as_module and argv[2] in LAUNCHERS:
        subprocess.Popen = LaunchersPopen  # type: ignore[misc]
        return
    subprocess.Popen = _popen  # type: ignore[misc]
    sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
    if env.get("PYTHONFAULTHANDLER"):
        faulthandler.enable(2)
    if env.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # Not in a launcher, because this starts threads.


_popen = subprocess.Popen


def _stream(number: int, was: io.TextIOWrapper, buffered: bool) -> io.TextIOWrapper:
    """Make a standard stream as the interpreter does; encoding and errors depend on the locale, which is the same."""
    raw = io.FileIO(number, was.mode, closefd=False)
    raw.name = was.name
    binary = io.BufferedReader(raw) if was.mode == "r" else io.BufferedWriter(raw) if buffered else raw
    by_line = buffered and (number == 2 or raw.isatty())
    stream = io.TextIOWrapper(binary, was.encoding, was.errors, "\n", by_line, not buffered)  # type: ignore[type-var]
    stream.mode = was.mode  # type: ignore[misc]
    return stream


def _follow_home() -> None:
    """Move the paths that huggingface_hub and datasets computed at their import to today's home folder."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        for name, value in list(vars(sys.modules.get(module, object)).items()):
            if isinstance(value, str | Path) and str(value).startswith(f"{HOME}{os.sep}"):
                setattr(sys.modules[module], name, type(value)(Path.home() / Path(value).relative_to(HOME)))


def _run(argv: Sequence[str]) -> int:
    """Run the program in a `__main__` of its own; returns its exit code, negative for a signal."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    try:
        if argv[1] == "-m":
            if not hasattr(sys.modules.get(argv[2]), "__path__"):  # A package's program is its __main__.
                sys.modules.pop(argv[2], None)
            runpy._run_module_as_main(argv[2])  # type: ignore[attr-defined]
        else:
            main.__file__, main.__cached__ = argv[1], None  # type: ignore[attr-defined]
            main.__loader__ = SourceFileLoader("__main__", argv[1])
            exec(compile(Path(argv[1]).read_bytes(), argv[1], "exec", dont_inherit=True), vars(main))
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return (left.code or 0) & 0xFF
        print(left.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _finish(code: int) -> int:
    """Do what an interpreter does at its end."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    _SIGINT = signal.SIG_IGN if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest; this process ends when pytest does.
    load()
    serve(socket.socket(fileno=int(sys.argv[1])))
