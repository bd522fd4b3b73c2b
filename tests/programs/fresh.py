"""Says what a program can see of how it was started, as JSON into the file that it is given."""

import ctypes
import faulthandler
import json
import os
import random
import signal
import stat
import sys
import tempfile
import threading
from pathlib import Path

parent, path = os.getppid(), Path(sys.argv[1])
blocked = [number.name for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
# Of faulthandler's own signals Python knows only what stood there when it started; SigCgt tells.
faults = {"SIGSEGV", "SIGFPE", "SIGABRT", "SIGBUS", "SIGILL"} if faulthandler.is_enabled() else set()
names = {number: number.name for number in signal.valid_signals() if isinstance(number, signal.Signals)}
handlers = {name: repr(signal.getsignal(number)) for number, name in names.items() if name not in faults}
caught = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("SigCgt", "SigIgn"))]
pdeathsig = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(pdeathsig))


def kind(descriptor: int) -> str:
    return stat.filemode(os.fstat(descriptor).st_mode)[0]


def stream(file) -> list[object]:
    return [file.encoding, file.errors, file.line_buffering, file.write_through, file.fileno(), file.mode, file.name,
            type(file.buffer).__name__]  # fmt: skip


descriptors = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
open_now = {number: kind(number) for number in descriptors if Path(f"/proc/self/fd/{number}").exists()}

import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402

found = {
    "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "name": __name__, "file": __file__,
    "cwd": str(Path.cwd()),
    "spec": __spec__, "package": __package__, "main": sys.modules["__main__"].__dict__ is globals(),
    "env": {name: value for name, value in os.environ.items() if not name.startswith(("SKYSPOT_", "MASTER_"))},
    "getenv": os.environ.get("RANK", ""),
    "streams": [stream(sys.stdin), stream(sys.stdout), stream(sys.stderr)],
    "same": [sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__, sys.stdin is sys.__stdin__],
    "handlers": handlers, "caught": caught, "blocked": blocked, "wakeup": signal.set_wakeup_fd(-1),
    "descriptors": open_now, "pdeathsig": pdeathsig.value,
    "leads": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()],
    "launched": Path(f"/proc/{parent}/stat").read_text().split()[3] == os.environ.get("TEST_PID", ""),
    "threads": [torch.get_num_threads(), threading.active_count()],
    "main_thread": threading.main_thread() is threading.current_thread(),
    "hub": {name: value for name, value in vars(constants).items() if isinstance(value, str)},
    "default_dtype": str(torch.get_default_dtype()), "tmp": tempfile.gettempdir(),
    "umask": os.umask(0), "interval": sys.getswitchinterval(), "recursion": sys.getrecursionlimit(),
    "popen": __import__("subprocess").Popen.__module__, "write": sys.dont_write_bytecode, "home": str(Path.home()),
}  # fmt: skip
drawn = [random.random(), __import__("numpy").random.random(), torch.initial_seed()]
path.with_name(f"{path.name}-{os.environ.get('RANK', 0)}").write_text(json.dumps([found, drawn]))
