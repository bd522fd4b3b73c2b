"""`make e2e`: SkyPilot itself, on a real Slurm, with the real trainer, all on this machine's loopback.

    python tests/e2e/run.py [PYTEST OPTIONS]    install what is missing, start the lab, run the tests, stop it
    python tests/e2e/run.py --install           only install what is missing; what cannot be had is said by the next run
    python tests/e2e/run.py --up                leave a lab running; later runs use it
    python tests/e2e/run.py --down              stop that lab
    python tests/e2e/run.py --shell [COMMAND]   the user's shell (or a command of the user's) in that lab

Needs root and Debian's packages (it installs them; nothing else outside of its folder is changed). Where these cannot
be had it says so, every test is skipped, and the exit status is 0; in CI (the variable CI is set) it is 1, unless no
remedy would bring them: no Linux, or namespaces that are refused to root.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import install
import lab
from place import CLIENT, HOME, REPO, ROOT, UID

NAMESPACES = ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc",
              "--propagation", "private"]  # fmt: skip
HOLDER = ROOT / "holder.pid"
READY = ROOT / "ready"


def say(text: str) -> None:
    """A line of what is going on."""
    print(f"e2e: {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    if arguments[:1] == ["--inside"]:
        return inside(arguments[1:])
    if arguments[:1] == ["--down"]:
        return down()
    if arguments[:1] == ["--shell"]:
        return shell(arguments[1:])
    reason = install.missing()
    if reason is None:
        try:
            started = time.monotonic()
            install.install(say)
            say(f"installed all in {time.monotonic() - started:.1f} s, under {ROOT}")
        except install.Unavailable as error:
            reason = str(error)
    if arguments[:1] == ["--install"]:
        return 0
    if reason is not None:
        say(f"skipped: {reason}")
        return pytest(arguments, SKYSPOT_E2E_MISSING=reason)
    if arguments[:1] != ["--up"] and (init := running_lab()):
        return subprocess.run(entering(init, *command_of(arguments)), cwd=REPO, env=environment()).returncode
    if arguments[:1] == ["--up"] and running_lab():
        say("the lab is up already")
        return 0
    with only_lab() as lock:
        return hold(lock) if arguments[:1] == ["--up"] else alone(arguments, lock)


@contextlib.contextmanager
def only_lab() -> Iterator[socket.socket]:
    """Wait for a socket's name that one process has at a time: two labs would share their user and their folder.

    The name is in no folder: when the last process of a lab dies, it is free again.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        for waited in itertools.count():
            try:
                lock.bind(f"\0skyspot-e2e-{UID}")
                break
            except OSError:
                if not waited:
                    say("waiting: another lab is running on this machine")
                time.sleep(1)
        yield lock


def command_of(arguments: list[str]) -> list[str]:
    """Pytest over this folder."""
    folder = (
        [] if any(argument.split("::")[0].endswith(".py") for argument in arguments) else [str(Path(__file__).parent)]
    )
    return [sys.executable, "-m", "pytest", "--rootdir", str(REPO), "-p", "no:cacheprovider", *folder, *arguments]


def environment(**more: str) -> dict[str, str]:
    """Ours, and that these tests are meant to run."""
    return {**os.environ, "SKYSPOT_E2E": "1", **more}


def pytest(arguments: list[str], **more: str) -> int:
    """Run the tests, here."""
    return subprocess.run(command_of(arguments), cwd=REPO, env=environment(**more)).returncode


def alone(arguments: list[str], lock: socket.socket) -> int:
    """A lab for one run of the tests; afterwards nothing is left of it, whatever happened."""
    # Interrupted, pytest reports first; the lab ends with it. Killed, the lab's first process dies with us.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT,)}
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, sys.executable, __file__, "--inside", *arguments],
        cwd=REPO, env=environment(), pass_fds=[lock.fileno()],
    )  # fmt: skip

    def stop(number: int, frame: FrameType | None) -> None:
        process.kill()

    signal.signal(signal.SIGTERM, stop)
    code = process.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    return clean_up() or code


def clean_up() -> int:
    """See that nothing is left; 1 where something is, with a line each."""
    deadline = time.monotonic() + 10
    while (left := lab.left_overs()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for line in left:
        say(f"left over: {line}")
    for path in Path("/tmp").iterdir():
        with contextlib.suppress(FileNotFoundError):  # Other programs' files come and go.
            if path != ROOT and path.lstat().st_uid == UID:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
    return 1 if left else 0


def inside(arguments: list[str]) -> int:
    """The first process in the namespaces: starts the lab and the tests, and reaps whatever loses its parent."""
    holding = arguments[:1] == ["--hold"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(143))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            lab.up(say)
            if holding:
                READY.write_text("")
                signal.pause()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os.execvpe(sys.executable, command_of(arguments), environment())
    while True:
        try:
            pid, status = os.wait()
        except InterruptedError:
            continue
        if pid == child:
            return os.waitstatus_to_exitcode(status) if os.waitstatus_to_exitcode(status) >= 0 else 1


def hold(lock: socket.socket) -> int:
    """Start a lab that stays."""
    READY.unlink(missing_ok=True)
    log = ROOT / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", *NAMESPACES, sys.executable, __file__, "--inside", "--hold"],
            cwd="/", env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            pass_fds=[lock.fileno()],
        )  # fmt: skip
    HOLDER.write_text(str(process.pid))
    while not READY.exists():
        if process.poll() is not None:
            say(f"the lab did not start:\n{log.read_text()}")
            return 1
        time.sleep(0.2)
    print(log.read_text(), end="")
    return 0


def running_lab() -> int | None:
    """The first process (as seen from here) of the lab that stays; None where there is none."""
    try:
        holder = int(HOLDER.read_text())
        if b"unshare" not in Path(f"/proc/{holder}/cmdline").read_bytes() or not READY.exists():
            return None
        return int(Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def entering(init: int, *command: str) -> list[str]:
    """A command line that runs in that lab's namespaces."""
    return ["nsenter", "--target", str(init), "--net", "--pid", "--mount", "--uts", "--ipc", *command]


def shell(command: list[str]) -> int:
    """The user's shell, or a command of the user's, in the lab that stays."""
    init = running_lab()
    if init is None:
        say("no lab is up: python tests/e2e/run.py --up")
        return 1
    line = ["sh", "-c", 'cd "$0" && exec "$@"', str(HOME / "project"), *(command or ["bash", "-l"])]
    env = {**lab.user_environment(), "TERM": os.environ.get("TERM", "dumb"), "VIRTUAL_ENV": str(CLIENT)}
    return subprocess.run(entering(init, *lab.as_user(line)), env=env).returncode


def down() -> int:
    """Stop the lab that stays."""
    if (init := running_lab()) is not None:
        os.kill(init, signal.SIGKILL)
    HOLDER.unlink(missing_ok=True)
    READY.unlink(missing_ok=True)
    return clean_up()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
