"""The launcher: one process per accelerator, signals passed on once, exit codes kept."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import warm
from support import clean_env, event, launch

from trainer.launch.exits import combined_code, reported_code
from trainer.launch.nodes import Nodes, NodesError
from trainer.launch.process_count import LaunchError, process_count
from trainer.launch.rank import Rank
from trainer.launch.relay import LONGEST_LINE_BYTES, Lines
from trainer.layout.events import read_events, read_progress
from trainer.layout.names import AttemptName, RunPaths, list_attempts

HEAD = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


def script(folder: Path, body: str) -> Path:
    path = folder / "program.py"
    path.write_text(HEAD + body)
    return path


def command(path: Path, *options: object, processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "trainer.launch", "--processes", str(processes), *map(str, options), str(path)]


def run(path: Path, *options: object, processes: int = 2, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(path, *options, processes=processes), capture_output=True, text=True, env=clean_env(**env), timeout=60
    )


CODES = [
    ([0, 0, 0], 0), ([75, 75, 75], 75), ([75, 1, 75], 1), ([0, 75, 0], 75), ([76, 75, 75], 76), ([75, 80, 76], 80),
    ([79, 76, 75], 79), ([80, 1, 79], 1), ([0, 0, 3], 1), ([75, 42, 75], 1), ([-9, 0, 0], 75), ([75, -15, 75], 75),
    ([0, None], 75), ([1, None], 1), ([0], 0), ([80, 79, 76, 75, 2], 1),
]  # fmt: skip


@pytest.mark.parametrize(("codes", "expected"), CODES, ids=str)
def test_the_exit_code_is_the_first_of_the_stop_table_that_any_rank_gave(codes, expected) -> None:
    for order in itertools.permutations(codes):
        assert combined_code(order) == expected


@pytest.mark.parametrize(("codes", "expected"), [([80, 1, 79], 1), ([-9, 0, 0], 75), ([0, 76, 75], 76)], ids=str)
def test_a_launcher_leaves_with_the_first_of_the_stop_table(tmp_path: Path, codes, expected) -> None:
    body = (
        f"code = {codes!r}[rank]\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"  # A peer's leaving must not change what this one gives.
        f"open(r'{tmp_path}/ready%d' % rank, 'w').close()\n"
        f"while not all(os.path.exists(r'{tmp_path}/ready%d' % other) for other in range(3)): time.sleep(0.01)\n"
        "if code < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "os._exit(code)\n"
    )
    assert run(script(tmp_path, body), "--grace", 5, processes=3).returncode == expected


def test_a_signal_reaches_every_rank_once(tmp_path: Path) -> None:
    body = (
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: heard.append(1))\n"
        f"open(r'{tmp_path}/ready%d' % rank, 'w').close()\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.4)\n"
        "print('rank', rank, 'heard', len(heard), flush=True)\n"
        # Who leaves first has the launcher send the other a SIGTERM of its own: both have counted by then.
        f"open(r'{tmp_path}/counted%d' % rank, 'w').close()\n"
        f"while not all(os.path.exists(r'{tmp_path}/counted%d' % other) for other in range(2)): time.sleep(0.01)\n"
        "os._exit(75)\n"
    )
    process = subprocess.Popen(
        command(script(tmp_path, body)), env=clean_env(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    os.killpg(
        process.pid, signal.SIGTERM
    )  # As a Ctrl-C or SkyPilot does: the whole group. Ranks have groups of their own.
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(output.splitlines()) == ["rank 0 heard 1", "rank 1 heard 1"]


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_when_the_launcher_is_killed_its_ranks_die_with_it(tmp_path: Path) -> None:
    body = f"open(r'{tmp_path}/%d' % os.getpid(), 'w').close()\ntime.sleep(60)\n"
    process = subprocess.Popen(command(script(tmp_path, body)), env=clean_env())
    wait_for(lambda: len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 2)
    pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    process.kill()
    process.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids))


def test_a_rank_that_ignores_everything_is_killed_after_the_grace(tmp_path: Path) -> None:
    body = (
        f"deaf = r'{tmp_path}/deaf'\n"
        "if rank == 1:\n"
        "  while not os.path.exists(deaf): time.sleep(0.01)\n"
        "  os._exit(1)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(deaf, 'w').close()\n"
        "while True: time.sleep(1)\n"
    )
    ended = run(script(tmp_path, body), "--grace", 0.2)
    assert (ended.returncode, ended.stderr) == (1, "rank 0 did not leave in time: killed\n")


def test_a_stopped_rank_does_not_keep_the_launcher(tmp_path: Path) -> None:
    body = (
        f"pid = r'{tmp_path}/pid'\n"
        "if rank == 1:\n"
        "  while not os.path.lexists(pid): time.sleep(0.01)\n"
        "  stat = f'/proc/{os.readlink(pid)}/stat'\n"
        "  while os.path.exists(stat) and ') T ' not in open(stat).read(): time.sleep(0.01)\n"
        "  os._exit(75)\n"
        "os.symlink(str(os.getpid()), pid)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    assert run(script(tmp_path, body), "--grace", 0.2).returncode == 75


def test_output_that_a_grandchild_keeps_open_does_not_keep_the_launcher(tmp_path: Path) -> None:
    body = "import subprocess\nprint(subprocess.Popen(['sleep', '40'], start_new_session=True).pid)\n"
    begun = time.monotonic()
    process = subprocess.Popen(
        command(script(tmp_path, body), processes=1), env=clean_env(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    with process:
        output = process.stdout.read()  # Until the launcher's own end of the pipe is closed.
    assert process.returncode == 0
    child = psutil.Process(int(output))  # It lives.
    child.kill()
    assert time.monotonic() - begun < 30


def test_a_reader_that_goes_away_does_not_disturb_the_ranks(tmp_path: Path) -> None:
    body = f"for i in range(200): print('x' * 1000, flush=True)\nopen(r'{tmp_path}/done', 'w').close()\n"
    process = subprocess.Popen(command(script(tmp_path, body), processes=1), env=clean_env(), stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


def test_lines_of_several_ranks_are_not_mixed(tmp_path: Path) -> None:
    body = "for i in range(300):\n  sys.stdout.write('ab' * 50); sys.stdout.flush(); sys.stdout.write('\\n')\n"
    output = run(script(tmp_path, body), processes=2).stdout
    assert output.count("\n") == 600


def bar(states: int, end: bytes = b"") -> list[bytes]:
    return [b"\r%3d%%|%s|" % (number * 100 // states, b"#" * 60) for number in range(1, states + 1)] + [end]


def test_a_bar_of_another_rank_is_kept_in_its_last_state_alone() -> None:
    lines = Lines(bars=False)
    passed = [lines.take(state) for state in bar(20_000)]
    assert set(passed) == {b""}
    assert len(lines._kept) < 200
    assert lines.take(b"\nloss 2.5\nloss") == b"\r100%|" + b"#" * 60 + b"|\nloss 2.5\n"
    assert lines.take(b" 2.4\r") == b""
    assert lines.take(b"\n") == b"loss 2.4\r\n", "a line may end as on another system"
    assert lines.take(b"".join(bar(3))) == b""
    assert lines.rest() == b"\r100%|" + b"#" * 60 + b"|\n"
    assert lines.rest() == b""


def test_of_a_bar_on_another_rank_the_launcher_says_where_it_ended(tmp_path: Path) -> None:
    body = "for i in range(1001):\n  if rank: sys.stderr.write('\\r%4d of 1000 ' % i + '#' * 80); sys.stderr.flush()\n"
    said = run(script(tmp_path, body)).stderr
    assert said.count("of 1000") == 1
    assert "1000 of 1000" in said


def test_a_bar_of_rank_0_is_passed_on_as_it_goes() -> None:
    lines = Lines(bars=True)
    assert b"".join(lines.take(state) for state in bar(50, b"\n")) == b"".join(bar(50, b"\n"))


@pytest.mark.parametrize("bars", [False, True])
def test_a_line_without_an_end_is_passed_on_in_pieces(bars: bool) -> None:
    lines, passed, longest = Lines(bars=bars), b"", 0
    for _ in range(1000):
        passed += lines.take(b"." * 1000)
        longest = max(longest, len(lines._kept))
    assert longest <= LONGEST_LINE_BYTES
    assert (passed + lines.rest()).rstrip(b"\n") == b"." * 1_000_000


def test_each_rank_gets_what_torchrun_would_give_it(tmp_path: Path) -> None:
    body = (
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS GOMP_SPINCOUNT'\n"
        "print(*[os.environ[name] for name in names.split()], bool(os.environ['MASTER_PORT']))\n"
    )
    lines = sorted(run(script(tmp_path, body)).stdout.splitlines())
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert lines == [f"{rank} {rank} 2 2 127.0.0.1 {threads} 5000 True" for rank in (0, 1)]


def test_a_plain_torch_script_of_several_processes_finds_its_peers(tmp_path: Path) -> None:
    body = (
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "print('world', dist.get_world_size())\n"
        "dist.destroy_process_group()\n"
    )
    done = warm.run(command(script(tmp_path, body)), capture_output=True, text=True, env=clean_env(), timeout=60)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["world 2", "world 2"]), done.stderr


def test_a_rehearsals_number_of_processes_beats_the_commands(tmp_path: Path) -> None:
    output = run(script(tmp_path, "print('here')\n"), processes=4, SKYSPOT_PROCESSES="2").stdout
    assert output.splitlines() == ["here", "here"]


@pytest.mark.parametrize(
    ("setup", "env", "remedy"),
    [
        (lambda folder: (folder / "trainer.py").write_text(""), {}, "rename it"),
        (lambda folder: (folder / "program.py").unlink(), {}, "no such script"),
        (lambda folder: None, {"SKYPILOT_NUM_NODES": "2"}, "SKYPILOT_NODE_IPS has 0 addresses"),
        (lambda folder: None, {"SKYSPOT_PROCESSES": "many"}, "SKYSPOT_PROCESSES"),
    ],
)
def test_what_cannot_be_launched_is_refused_in_a_line(tmp_path: Path, setup, env: dict, remedy: str) -> None:
    path = script(tmp_path, "print('ran')\n")
    setup(tmp_path)
    done = run(path, **env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert remedy in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["\u00b2", "\u0663", "9" * 5000, "-1", "1.0", " 1"], ids=lambda text: ascii(text)[:9])
def test_what_is_no_number_is_refused_in_a_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYSPOT_PROCESSES", text)
    with pytest.raises(LaunchError, match="SKYSPOT_PROCESSES"):
        process_count(None, cpu=True)
    with pytest.raises(NodesError, match="SKYPILOT_NUM_NODES"):
        Nodes.from_env({"SKYPILOT_NUM_NODES": text})
    monkeypatch.delenv("SKYSPOT_PROCESSES")
    monkeypatch.setenv("SKYPILOT_NUM_GPUS_PER_NODE", text)
    assert process_count(None, cpu=False) >= 1


@pytest.mark.parametrize(
    ("text", "code"), [("75", 75), ("0", 0), ("\u00b2", None), ("9" * 5000, None), ("-1", None), ("", None)],
    ids=lambda value: ascii(value)[:9],
)  # fmt: skip
def test_a_report_that_is_no_exit_code_is_passed_over(text: str, code: int | None) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb"), os.fdopen(write, "wb", buffering=0) as report:
        rank = Rank(None, to_rank=-1, from_rank=read)
        report.write(f"exit {text}\n".encode())
        assert rank.receive()
    assert rank.reported_code == reported_code(text) == code


def test_where_rank_0_dies_its_end_is_recorded_by_a_child(tmp_path: Path) -> None:
    body = (
        "from pathlib import Path\n"
        "from trainer.attempt.record import open_attempt\n"
        "from trainer.launch.link import Link\n"
        "from trainer.layout.names import RunPaths\n"
        f"paths = RunPaths(Path(r'{tmp_path}/run'))\n"
        "mine = open_attempt(paths, launch=os.environ['SKYSPOT_LAUNCH'], config={}, binding={})\n"
        "Link.from_env().report_attempt(paths.root, mine.name)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = run(script(tmp_path, body), processes=1)
    assert (died.returncode, died.stderr) == (
        75,
        "rank 0 was killed by SIGKILL. Linux does that where memory runs out\n",
    )
    assert event(tmp_path / "run", "end")["cause"] == "died"
    assert event(tmp_path / "run", "end")["code"] == 75


def test_a_crash_in_native_code_is_named_and_its_stacks_are_printed(tmp_path: Path) -> None:
    body = "if rank: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(60)\n"  # Rank 0 is told to leave by SIGTERM.
    died = run(script(tmp_path, body), processes=2)
    assert died.returncode == 75
    assert "Fatal Python error: Segmentation fault" in died.stderr
    assert [line for line in died.stderr.splitlines() if "was killed" in line] == ["rank 1 was killed by SIGSEGV"]


# -- scripts that know nothing of attempts ---------------------------------------------------------------------------


def test_a_scripts_attempt_is_recorded_where_a_folder_is_given(tmp_path: Path) -> None:
    path = script(tmp_path, "print(os.environ['SKYSPOT_ATTEMPT'])\n")
    done = run(path, "--checkpoint-dir", tmp_path / "run", processes=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list_attempts(RunPaths(tmp_path / "run"))[0])
    assert event(tmp_path / "run", "start")["launch"].startswith("local-")
    assert event(tmp_path / "run", "end")["cause"] == "finished"


def test_a_script_that_gets_nowhere_is_stopped_with_80_after_three_attempts(tmp_path: Path) -> None:
    path = script(tmp_path, "sys.exit(75)\n")
    options = ("--checkpoint-dir", tmp_path / "run")
    codes = [run(path, *options, processes=1, SKYPILOT_TASK_ID="sky-1").returncode for _ in range(4)]
    assert codes == [75, 75, 75, 80]
    assert run(path, *options, processes=1, SKYPILOT_TASK_ID="sky-2").returncode == 75, "a new launch starts from zero"


@pytest.mark.slow
@pytest.mark.parametrize("leads", [True, False], ids=["one machine", "the second of two machines"])
@pytest.mark.parametrize(
    ("struck", "code", "cause"),
    [
        (signal.SIGTERM, 75, "signal"), (signal.SIGINT, 75, "signal"), (signal.SIGUSR1, 75, "signal"),
        (signal.SIGKILL, 75, "died"), (None, 1, "died"), (0, 0, "finished"),
    ],
    ids=str,
)  # fmt: skip
def test_a_scripts_ranks_end_as_the_table_says(
    tmp_path: Path, struck: int | None, code: int, cause: str, leads
) -> None:
    """A signal to the launcher; a kill or an exception in one of two ranks. Records are the first machine's affair."""
    body = (
        f"open(r'{tmp_path}/ready%d' % os.getpid(), 'w').close()\n"
        "if os.environ['LOCAL_RANK'] == '1':\n"
        f"  while not os.path.exists(r'{tmp_path}/go'): time.sleep(0.01)\n"
        f"  if {struck is None}: raise RuntimeError('a mistake')\n"
        "  sys.exit()\n"
        f"while {struck != 0}: time.sleep(0.01)\n"
    )
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    env = clean_env(**({} if leads else {**nodes, "SKYPILOT_TASK_ID": "t"}))
    options = ("--checkpoint-dir", tmp_path / "run", "--grace", 0.2)
    with subprocess.Popen(command(script(tmp_path, body), *options), env=env, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2)
        if struck == signal.SIGKILL:
            os.kill(int(next(tmp_path.glob("ready*")).name.removeprefix("ready")), struck)
        elif struck:
            os.kill(process.pid, struck)
        (tmp_path / "go").touch()
        assert process.wait(60) == code
    if leads:
        assert (event(tmp_path / "run", "end")["cause"], event(tmp_path / "run", "end")["code"]) == (cause, code)
    else:
        assert not (tmp_path / "run").exists()


def test_an_attempt_that_a_newer_one_outnumbers_is_stopped_with_76(tmp_path: Path) -> None:
    body = f"open(r'{tmp_path}/ready', 'w').close()\ntime.sleep(60)\n"
    process = subprocess.Popen(
        command(script(tmp_path, body), "--checkpoint-dir", tmp_path / "run", "--grace", 1, processes=1),
        env=clean_env(),
    )
    wait_for(lambda: (tmp_path / "ready").exists())
    (tmp_path / "run" / "attempts" / "a0007-abcdef").mkdir()
    assert process.wait(30) == 76
    names = list_attempts(RunPaths(tmp_path / "run"))
    ends = [found for found in read_events(RunPaths(tmp_path / "run"), names[0]) if found.name == "end"]
    assert ends[0].fields["cause"] == "superseded"


def test_a_script_with_spotrun_under_a_sidecar_makes_one_attempt(tmp_path: Path) -> None:
    from support import PROGRAMS

    (tmp_path / "run").mkdir()
    done = warm.run(
        [sys.executable, "-m", "trainer.launch", "--processes", "1", "--checkpoint-dir", str(tmp_path / "run"),
         str(PROGRAMS / "mlp.py"), "--dir", str(tmp_path / "run")],
        env=clean_env(), capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths = RunPaths(tmp_path / "run")
    assert len(list_attempts(paths)) == 1
    assert len([found for found in read_events(paths, list_attempts(paths)[0]) if found.name == "end"]) == 1


def test_a_script_without_records_shows_how_long_it_lived_and_one_with_records_does_so_itself(tmp_path: Path) -> None:
    """An attempt that is killed without a word counts until its last record; see docs/report.md."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom trainer.launch import sidecar\n"
        "sidecar.LOOK_S = sidecar.LIVES_S = 0.05\nsidecar.record_attempt(Path(sys.argv[1]))\n"
    )
    command, paths = [sys.executable, "-c", program, str(tmp_path)], RunPaths(tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=clean_env(), text=True, **pipes) as sidecar:
        assert sidecar.stdout
        name = AttemptName.parse(sidecar.stdout.readline().split()[1])
        assert name
        wait_for(lambda: read_progress(paths, name).get("monotonic"))
        (paths.attempt(name) / "0002-bound.json").write_text('{"time": 1.0, "monotonic": 1.0}')
        wait_for(lambda: rewritten(paths.progress(name)) is False)
        (paths.attempts / "a0099-ffffff").mkdir()
        assert sidecar.stdout.readline() == "stop superseded\n", "it still looks"
        assert not paths.progress(name).exists()
        sidecar.kill()


def rewritten(path: Path) -> bool:
    """Whether a file comes again within ten looks of the sidecar."""
    path.unlink(missing_ok=True)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        if path.exists():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("code", [0, 1, 76])
def test_the_code_of_a_process_with_threads_is_its_own(tmp_path: Path, code: int) -> None:
    """While its threads die it is a zombie that cannot be reaped yet: that is not being killed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, threading, time\n"
        "for _ in range(16): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        f"sys.exit({code})\n"
    )
    for _ in range(4):
        assert launch(script).code == code
