"""Start a script without its imports: as a fork of a process that has imported torch, transformers and Lightning.

    python bench/preloaded.py serve SOCKET                          import all, say `ready`, and fork on request
    python -I -S bench/preloaded.py start SOCKET SCRIPT [ARGUMENT...]    what `python SCRIPT [ARGUMENT...]` would do

A start costs seconds of imports, and ckpt-chaos starts a script twice for each of its strikes. The fork has the
arguments, environment, working folder and descriptors of `start`, and runs the `sitecustomize` on its PYTHONPATH, by
which ckpt-chaos arms itself. `start` ends as the fork does; if `start` is killed, so is the fork.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LIBRARIES = ("transformers.trainer", "datasets", "peft", "lightning.pytorch")
"""On top of what tests/nursery.py imports."""
QUIET = {"GOMP_SPINCOUNT": "5000", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Without these, libraries start threads, and a fork has none of them."""


def start(address: str, arguments: list[str]) -> int:
    """Have the server fork a script, and wait for its end; returns its exit code, negative for a signal."""
    request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()  # noqa: PTH109 (pathlib takes 20 ms)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        answer = server.recv(8)
    return int.from_bytes(answer or (-signal.SIGKILL).to_bytes(8, "big", signed=True), "big", signed=True)


class Server:
    """Forks scripts; single-threaded, so that a fork lacks nothing."""

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._ended, wake = socket.socketpair()
        self._ended.setblocking(False)
        wake.setblocking(False)
        self._wake = wake
        """Python writes to it at each signal."""
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake.fileno())
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._ended, selectors.EVENT_READ)
        self._clients: dict[int, socket.socket] = {}
        """By the fork's process id."""

    def serve(self) -> None:
        """Fork until this process is killed."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._fork(self._listener.accept()[0])
                elif key.fileobj is self._ended:
                    self._reap()
                else:
                    self._client_left(key.data)

    def _fork(self, client: socket.socket) -> None:
        import nursery
        from warm import Program

        request, sources = nursery.received(client)
        arguments, env, folder = json.loads(request)
        program = Program([sys.executable, *arguments], env, folder, [0, 1, 2], new_session=False)
        pid = os.fork()
        if not pid:
            nursery.become(program, sources, lambda: customize(env))
        for source in sources:
            os.close(source)
        self._clients[pid] = client
        self._selector.register(client, selectors.EVENT_READ, pid)

    def _reap(self) -> None:
        self._ended.recv(4096)
        while self._clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            client = self._clients.pop(pid)
            with suppress(KeyError, OSError):  # It was killed, and so was the fork.
                self._selector.unregister(client)
                client.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
            client.close()

    def _client_left(self, pid: int) -> None:
        """`start` was killed: so is its fork, which is reaped as any other."""
        if client := self._clients.get(pid):
            self._selector.unregister(client)
            os.kill(pid, signal.SIGKILL)


def customize(env: dict[str, str]) -> None:
    """Run the `sitecustomize` on PYTHONPATH, as the interpreter does when it starts."""
    os.environ.clear()
    os.environ.update(env)
    asked = list(filter(None, env.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = asked
    sys.modules.pop("sitecustomize", None)
    with suppress(ModuleNotFoundError):
        import sitecustomize  # noqa: F401
    env.update(os.environ)  # It sets variables.
    del sys.path[: len(asked)]


@contextmanager
def serving(folder: Path) -> Iterator[list[str]]:
    """Serve; yields the beginning of the command that starts a script.

    Args:
        folder: Where to put the socket.
    """
    address = str(folder / "preloaded")
    command = [sys.executable, __file__, "serve", address]
    with subprocess.Popen(command, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            if server.stdout.readline() != "ready\n":
                raise SystemExit("the process that forks the scripts did not start")
            yield [sys.executable, "-I", "-S", __file__, "start", address]
        finally:
            server.kill()


def serve(address: str) -> None:
    """Import all, and serve."""
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests")
    import nursery

    for name in LIBRARIES:
        importlib.import_module(name)
    nursery.load()
    server = Server(address)
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    elif (code := start(sys.argv[2], sys.argv[3:])) >= 0:
        sys.exit(code)
    else:
        os.kill(os.getpid(), -code)
