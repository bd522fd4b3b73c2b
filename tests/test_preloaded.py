"""bench/preloaded.py: a script that is a fork of a process with its libraries ends as if Python had been started."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from bucket_lab import until
from support import REPO, clean_env

from bench import preloaded

SERVER = """\
import sys
sys.path[:0] = sys.argv[2:]
import torch
from bench.preloaded import Server
server = Server(sys.argv[1])
print("ready", flush=True)
server.serve()
"""
SCRIPT = """\
import json, os, signal, sys, threading
import torch
with open("said", "w") as file:
    json.dump([sys.argv[1:], os.getcwd(), os.environ["A"], os.environ.get("ARMED"), os.getpid(), __name__], file)
print("printed", flush=True)
if sys.argv[1] == "wait":
    threading.Event().wait()
if sys.argv[1].startswith("-"):
    os.kill(os.getpid(), -int(sys.argv[1]))
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """As `preloaded.serving`, with torch alone: the other libraries would take seconds."""
    folder = tmp_path_factory.mktemp("preloaded")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-c", SERVER, folder / "socket", REPO, REPO / "tests"]
    env = clean_env() | preloaded.QUIET
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        where = Path(str(preloaded.__file__))
        yield [sys.executable, "-I", "-S", str(where), "start", str(folder / "socket"), str(folder / "script.py")]
        server.kill()


@pytest.mark.parametrize("code", [0, 3, 137, -signal.SIGTERM, -signal.SIGKILL])
def test_a_script_has_what_it_was_given_and_ends_as_it_does(start: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    # By this ckpt-chaos gets into a script.
    (tmp_path / "boot" / "sitecustomize.py").write_text('import os\nos.environ["ARMED"] = os.environ["A"] + "rmed"\n')
    env = clean_env(A="a", PYTHONPATH=str(tmp_path / "boot"))
    done = subprocess.run([*start, str(code)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "printed\n", "")
    said = json.loads((tmp_path / "said").read_text())
    assert [*said[:4], said[5]] == [[str(code)], str(tmp_path), "a", "armed", "__main__"]


def test_a_script_dies_with_what_started_it(start: list[str], tmp_path: Path) -> None:
    with subprocess.Popen([*start, "wait"], env=clean_env(A="a"), cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"printed\n"
        pid = json.loads((tmp_path / "said").read_text())[4]
        assert os.getpgid(pid)
        process.kill()
    until("the script is gone", lambda: not psutil.pid_exists(pid))
