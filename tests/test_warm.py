"""Warm starts, which most tests use: a program that was forked cannot be told from one that was started."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from needs import NOT_HERE
from support import PROGRAMS, REPO, clean_env, weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason=f"warm starts: {NOT_HERE}: made on Linux alone")
FRESH = PROGRAMS / "fresh.py"
STARTS = {"cold": subprocess.Popen, "warm": warm.Popen}


def start(how: str, command: list[object], **options: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    options = {"env": clean_env(), "cwd": PROGRAMS, "stdin": subprocess.DEVNULL, "text": True, **options}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with STARTS[how]([sys.executable, *map(str, command)], **pipes, **options) as process:
        out, err = process.communicate(timeout=150)
        return process.returncode, out, err


def told(path: Path, rank: int = 0) -> tuple[dict[str, object], list[float]]:
    return tuple(json.loads(path.with_name(f"{path.name}-{rank}").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"start_new_session": True, "cwd": "/", "stdin": None},
    {"env": clean_env(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", TMPDIR="/var/tmp", HOME="/", TEST="é",
                      PYTHONPATH=f"/nowhere:{REPO}")},
], ids=["folder", "environment"])  # fmt: skip
def test_a_forked_script_sees_what_a_started_one_sees(options: dict[str, object], tmp_path: Path) -> None:
    seen = {}
    for how in STARTS:
        assert start(how, [FRESH, tmp_path / "told", "", "-x é"], **options) == (0, "", "")
        seen[how] = told(tmp_path / "told")
    assert seen["warm"][0] == seen["cold"][0]
    assert set(seen["warm"][1]).isdisjoint(seen["cold"][1])


@pytest.mark.slow
def test_forked_ranks_see_what_started_ones_see(tmp_path: Path) -> None:
    seen = {}
    for how in STARTS:
        command = ["-m", "trainer.launch", "--processes", 2, FRESH, tmp_path / "told"]
        code, out, err = start(how, command, env=clean_env(TEST_PID=str(os.getpid())))
        assert (code, out, err) == (0, "", "")
        seen[how] = [told(tmp_path / "told", rank) for rank in (0, 1)]
    for warm_rank, cold_rank in zip(seen["warm"], seen["cold"], strict=True):
        assert warm_rank[0] == cold_rank[0]
        assert warm_rank[0]["launched"]
        assert warm_rank[0]["pdeathsig"] == signal.SIGKILL
    assert len({number for ranks in seen.values() for _, drawn in ranks for number in drawn}) == 12


@pytest.mark.parametrize("ends", [
    "pass", "sys.exit(3)", "sys.exit(256)", "sys.exit(-1)", "sys.exit('said')", "raise ValueError('wrong')",
    "os.kill(os.getpid(), signal.SIGINT)", "os.kill(os.getpid(), signal.SIGTERM)", "os._exit(4)", "(",
])  # fmt: skip
def test_a_forked_script_ends_as_a_started_one(ends: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, signal, sys, threading, time\n"
        "def speak():\n"
        "    time.sleep(0.1)\n"
        "    print('a thread ends', end='')\n"
        "atexit.register(lambda: print('at exit'))\n"
        "sys.stdout.write('no newline, ')\n"
        "threading.Thread(target=speak).start()\n"
        f"{ends}\n"
    )
    assert start("warm", [script]) == start("cold", [script])


@pytest.mark.parametrize("command", [
    ["-m", "trainer.launch", "nowhere.py"], ["-m", "trainer.launch", "--grace", "soon", FRESH],
    ["-m", "trainer", "--no-such"], ["-m", "trainer", "--help"], ["-m", "trainer.finetune", "--no-such"],
    ["-m", "trainer.nowhere"],
], ids=str)  # fmt: skip
def test_a_forked_module_says_what_a_started_one_says(command: list[str]) -> None:
    assert start("warm", command) == start("cold", command)


@pytest.mark.slow
def test_warm_and_cold_runs_have_the_same_weights_and_say_the_same(
    undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    env = clean_env(OMP_NUM_THREADS="1")
    said = {}
    for how in STARTS:
        command = ["-m", "trainer.launch", "--processes", 2, PROGRAMS / "faulty.py", "--dir", tmp_path / how]
        code, out, err = start(how, command, env=env)
        assert (code, err) == (0, "")
        lines = [line.partition("tok/s")[0].rpartition("  ")[0] for line in out.splitlines() if "tok/s" in line]
        ends = [lines[0], lines[-1]]  # How many stand between them depends on how long the steps take.
        said[how] = [ends, out.splitlines()[-1].replace(str(tmp_path / how), "RUN"), weights(tmp_path / how)]
    assert said["warm"] == said["cold"]
    assert weights(undisturbed(2)) == said["cold"][2]


def test_what_a_fork_cannot_give_is_started_cold(tmp_path: Path) -> None:
    here, env = str(tmp_path), clean_env()
    (tmp_path / "script.py").touch()
    assert not warm.needs_a_cold_start([sys.executable, "script.py"], env, here)
    assert not warm.needs_a_cold_start([sys.executable, "-m", "trainer"], env, here)
    for argv in (["python", "script.py"], [sys.executable, "-c", ""], [sys.executable, "-S", "script.py"],
                 [sys.executable], [sys.executable, "-m", "skyspot"], [sys.executable, "nowhere.py"]):  # fmt: skip
        assert warm.needs_a_cold_start(argv, env, here), argv
    for name in ("HF_HOME", "PYTHONHASHSEED", "LD_PRELOAD", "TORCH_CPP_LOG_LEVEL", "LC_ALL"):
        assert warm.needs_a_cold_start([sys.executable, "script.py"], {**env, name: "1"}, here), name
    for name in ("sitecustomize.py", "torch.py", "accelerate", "json.py"):
        (tmp_path / "other" / name).mkdir(parents=True)
        assert warm.needs_a_cold_start(
            [sys.executable, "script.py"], {**env, "PYTHONPATH": str(tmp_path / "other")}, here
        ), name
        assert warm.needs_a_cold_start([sys.executable, "script.py"], env, str(tmp_path / "other")), name
        (tmp_path / "other" / name).rmdir()


def test_another_copy_of_the_trainer_is_the_one_that_runs(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("print('the copy')\n")
    (tmp_path / "trainer" / "layout.py").write_text("print('its layout')\n")
    (tmp_path / "script.py").write_text("import trainer.layout\n")
    assert start("warm", [tmp_path / "script.py"])[:2] == (0, "the copy\nits layout\n")


def test_a_fork_is_a_child_like_any_other_and_outlives_the_warm_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import os, time\nprint(os.getppid(), flush=True)\ntime.sleep(60)\n")
    process = warm.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True, env=clean_env())
    assert process.stdout
    assert int(process.stdout.readline()) == os.getpid()
    assert process.poll() is None
    forker = warm.nursery()._process
    warm.close()
    assert forker.returncode == 0
    assert process.poll() is None
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    process.stdout.close()


def test_programs_start_warm_whatever_the_tests_have_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("accelerate.data_loader")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/of-torch")
    assert not warm.needs_a_cold_start([sys.executable, "-m", "trainer.launch", "x.py"], clean_env(), str(REPO))
