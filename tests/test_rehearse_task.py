"""What a rehearsal gives a task, and what it says of one that fails."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from needs import NOT_HERE
from support import PROGRAMS
from support_rehearse import is_exact, leftovers, rehearse
from traced import Fs

from skyspot.errors import UsageError
from skyspot.rehearsal import faults
from skyspot.rehearsal.injector import Injector
from skyspot.rehearsal.limits import format_duration, limit_s
from skyspot.rehearsal.machine import Machine
from skyspot.rehearsal.metadata import AwsMetadata
from skyspot.rehearsal.needs import gpu_notes, gpus_here, with_needs
from skyspot.rehearsal.pace import Pace, pace, too_short
from skyspot.rehearsal.result import Settings
from skyspot.rehearsal.saves import Learnt, study
from skyspot.rehearsal.task import RehearsalTask, read_task
from skyspot.rehearsal.view import View
from skyspot.rehearsal.watch import Watch
from skyspot.task.durations import read_duration

FAILS = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
workdir: code
run: |
  echo '{"step": 1}' > /checkpoints/state.json
  python train.py
"""
TRAIN = """\
import json
import sys
import time
from pathlib import Path

print("starting")


def resume():
    return json.loads(Path("/checkpoints/result.json").read_text())["steps"]


if Path("/checkpoints/began").exists():
    print(f"resuming from step {resume()}")
Path("/checkpoints/began").touch()
time.sleep(1)
Path("/checkpoints/result.json").write_text('{"step": 2}')
if len(sys.argv) > 1:
    sys.exit("Error: no data")
"""


def failing(folder: Path, *args: str) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "train.py").write_text(TRAIN)
    (folder / "task.yaml").write_text(FAILS.replace("train.py", " ".join(["train.py", *args])))


def test_a_resume_that_fails_is_shown_with_its_error_and_the_users_line_and_its_output_is_kept(tmp_path: Path) -> None:
    failing(tmp_path)
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result.json", "--json"]
    done = rehearse(*args, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    leg = json.loads(done.stdout)["legs"][1]
    log = Path(leg["log"])
    _, code, error, place, kept = leg["verdict"]["text"].splitlines()
    assert code == "exit 1"
    assert error.startswith("  FileNotFoundError: ")
    assert place == (
        '    train.py, line 10, in resume: return json.loads(Path("/checkpoints/result.json").read_text())["steps"]'
    )
    assert kept == f"  its whole output: {log}"
    assert log.read_text().startswith("starting\nTraceback")
    assert log.parent.name.startswith("skyspot-rehearsal-log-")
    assert leftovers(tmp_path) == [str(log.parent)]


def test_where_everything_is_kept_the_output_is_there(tmp_path: Path) -> None:
    failing(tmp_path, "fail")
    done = rehearse("task.yaml", "--keep", "kept", cwd=tmp_path)
    assert done.returncode == 1
    log = tmp_path / "kept" / "reference" / "machine-01.log"
    assert log.read_text() == "starting\nError: no data\n"
    assert "\nexit 1\n  Error: no data\n" in done.stdout
    assert f"its whole output: {log}" in done.stdout
    assert leftovers(tmp_path) == []


def test_an_error_of_the_script_itself_has_its_line_in_run(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("run: |\n  set -e\n  trainn --lr 1\n")
    done = rehearse("task.yaml", cwd=tmp_path)
    assert "\nexit 127\n  run: line 2: trainn: command not found\n" in done.stdout


# -- what the task finds on its machine


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ("", 0),
        ("resources: {cpus: 4}", 0),
        ("resources: {accelerators: A100:8}", 8),
        ("resources: {accelerators: A100}", 1),
        ("resources: {accelerators: 'T4:0.5'}", 1),
        ("resources: {accelerators: {L4: 4}}", 4),
        ("resources: {accelerators: [L4:2, A100:8]}", 2),
        ("resources: {ordered: [{accelerators: H100:4}, {accelerators: A100:8}]}", 4),
        ("resources: {any_of: [{infra: aws}, {infra: gcp}], accelerators: L4:3}", 3),
        ("resources: {accelerators: 'A100:many'}", 1),
    ],
)
def test_the_number_of_gpus_is_what_the_first_rung_requests(tmp_path: Path, resources: str, gpus: int) -> None:
    assert read_task(f"{resources}\nrun: x\n", tmp_path, {}, None).gpus_per_node == gpus


SHOWS = """\
resources: {accelerators: "A100:8"}
envs: {MORE: "1"}
setup: touch ~/ready
run: |
  echo "$SKYPILOT_NUM_GPUS_PER_NODE gpus, cuda '${CUDA_VISIBLE_DEVICES-unset}', offline $HF_HUB_OFFLINE"
  for python in python python3 ~/skyspot/python; do $python -c 'import sys; print(sys.prefix)'; done
  exit 3
"""


def shown(folder: Path, *args: object) -> tuple[list[str], str]:
    """What the task prints on its machine, and the whole of the rehearsal's output without line ends."""
    (folder / "task.yaml").write_text(SHOWS)
    done = rehearse("task.yaml", "--keep", "kept", *args, cwd=folder)
    assert done.returncode == 1, done.stderr
    printed = (folder / "kept" / "reference" / "machine-01.log").read_text().splitlines()
    shutil.rmtree(folder / "kept")
    return printed, " ".join(done.stdout.split())


def test_a_task_finds_its_accelerators_and_a_python_and_is_told_where_the_machine_differs(tmp_path: Path) -> None:
    cuda = "''" if not gpus_here() else "'unset'"
    first, output = shown(tmp_path)
    assert first == [f"8 gpus, cuda {cuda}, offline 1", *[sys.prefix] * 3]
    assert "note: the task's `setup` was not run; --setup runs it" in output
    assert f"note: `python` on its machines was {sys.executable} (3." in output
    assert "; --python VENV chooses another." in output
    if not gpus_here():
        assert (
            "note: this machine has no GPU, so CUDA_VISIBLE_DEVICES was empty. SKYPILOT_NUM_GPUS_PER_NODE was 8"
            in output
        )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    more = ["--env", "HF_HUB_OFFLINE=0", "--env", "CUDA_VISIBLE_DEVICES=7"]
    second, output = shown(tmp_path, "--gpus-per-node", 2, "--python", "venv", "--setup", *more)
    assert second == ["2 gpus, cuda '7', offline 0", *[str(tmp_path / "venv")] * 3]
    assert f"was {tmp_path}/venv/bin/python (3." in output
    assert "chooses another" not in output
    assert "--setup" not in output


@pytest.mark.parametrize(
    ("count", "here", "chosen", "said"),
    [
        (0, 0, False, []),
        (1, 1, False, []),
        (2, 8, False, []),
        (8, 1, False, ["has 1 GPU. SKYPILOT_NUM_GPUS_PER_NODE was 8; --gpus-per-node 1 changes it."]),
        (8, 2, True, ["has 2 GPUs. SKYPILOT_NUM_GPUS_PER_NODE was 8."]),
        (
            8,
            0,
            False,
            ["CUDA_VISIBLE_DEVICES was empty. SKYPILOT_NUM_GPUS_PER_NODE was 8; --gpus-per-node 1 changes it."],
        ),
    ],
)
def test_fewer_gpus_than_the_task_requests_are_said(count: int, here: int, chosen: bool, said: list[str]) -> None:
    notes = gpu_notes(count, here, chosen=chosen)
    assert len(notes) == len(said)
    assert all(note.endswith(text) for note, text in zip(notes, said, strict=True))


@pytest.mark.parametrize(("setup", "is_said"), [("true", False), ("pip install x", True)])
def test_the_template_commands_default_setup_is_no_difference(setup: str, is_said: bool) -> None:
    envs = {"SKYSPOT_SETUP": setup}
    task = RehearsalTask("r", "x", 'bash -c "$SKYSPOT_SETUP"', envs, (), None, frozenset(), ())
    assert any("`setup` was not run" in note for note in with_needs(task, Settings()).notes) == is_said


def test_gpus_are_counted_by_their_devices(tmp_path: Path) -> None:
    assert gpus_here(tmp_path) == 0
    (tmp_path / "kfd").touch()
    assert gpus_here(tmp_path) == 1
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus_here(tmp_path) == 2


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        (["--python", "nowhere"], "--python nowhere: no such Python"),
        (["--python", "./nowhere/python"], "no such Python; pass a virtual environment's folder"),
        (["--python", "."], "no virtual environment; it has no bin/python"),
        (["--python", "task.yaml"], "task.yaml does not run"),
        (["--python", "/bin/echo"], "/bin/echo is not a Python 3"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: must be from 0 to 64"),
    ],
)
def test_a_python_or_a_number_that_is_none_is_refused_in_a_line(tmp_path: Path, args: list[str], remedy: str) -> None:
    (tmp_path / "task.yaml").write_text("run: exit 1\n")
    done = rehearse("task.yaml", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert remedy in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- launchers

GLOO = """\
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank, out = dist.get_rank(), Path("/checkpoints")
assert dist.get_world_size() == 2
step, total = json.loads((out / "state.json").read_text()) if (out / "state.json").exists() else (0, 0.0)
while step < 120:
    value = torch.tensor([float(step + rank)])
    dist.all_reduce(value)
    step, total = step + 1, total + value.item()
    time.sleep(0.05)
    if rank == 0 and step % 5 == 0:
        (out / "state.tmp").write_text(json.dumps([step, total]))
        (out / "state.tmp").replace(out / "state.json")
if rank == 0:
    (out / "result.json").write_text(json.dumps(total))
dist.destroy_process_group()
"""
MASTER = '--master_addr=$(echo "$SKYPILOT_NODE_IPS" | head -n1)'
NODES = "--nnodes=$SKYPILOT_NUM_NODES"
RANKS = "--nproc_per_node=$SKYPILOT_NUM_GPUS_PER_NODE"
LAUNCHERS = {
    "torchrun": f"torchrun {NODES} {RANKS} {MASTER} --node_rank=$SKYPILOT_NODE_RANK --master_port=PORT train.py",
    "torchrun, rendezvous": f"torchrun {NODES} {RANKS} --rdzv_id=$SKYPILOT_TASK_ID --rdzv_backend=c10d "
    '--rdzv_endpoint=$(echo "$SKYPILOT_NODE_IPS" | head -n1):PORT train.py',
    "accelerate": "accelerate launch --multi_gpu --num_processes $SKYPILOT_NUM_GPUS_PER_NODE --num_machines "
    "$SKYPILOT_NUM_NODES --machine_rank $SKYPILOT_NODE_RANK --main_process_port PORT train.py",
    "mpirun": "mpirun --allow-run-as-root --oversubscribe -n $SKYPILOT_NUM_GPUS_PER_NODE python mpi.py",
}
MPI = """\
import os

rank, ranks = os.environ["OMPI_COMM_WORLD_RANK"], os.environ["OMPI_COMM_WORLD_SIZE"]
os.environ.update(RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR=os.environ["SKYPILOT_NODE_IPS"], MASTER_PORT="PORT")
import train
"""


def free_port() -> str:
    """A port below those that the system gives to connections: one of these may be taken between two attempts, or, as
    long as nobody listens there, a client may be connected to itself."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


ONCE = ("torchrun", "accelerate", "mpirun")
"""With these, the run ends with 9 once it is done, so that nothing is preempted. A machine that is taken takes its
processes with it, whatever started them; torchrun with a rendezvous shows that."""


@pytest.mark.slow(30)  # Two processes import torch, once or three times.
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launchers_line_as_in_skypilots_docs_starts_a_process_for_each_gpu(tmp_path: Path, launcher: str) -> None:
    run = LAUNCHERS[launcher].replace("PORT", port := free_port())
    program = run.split()[0]
    if shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip(f"rehearsals of {program}: {NOT_HERE}: {program} is not installed")
    if launcher in ONCE:
        run += " && [ -s /checkpoints/result.json ] && exit 9"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(GLOO)
    (tmp_path / "code" / "mpi.py").write_text(MPI.replace('"PORT"', f'"{port}"'))
    (tmp_path / "task.yaml").write_text(
        "resources: {accelerators: 'A100:2'}\nworkdir: code\nfile_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        f"envs: {{OMP_NUM_THREADS: '1'}}\nrun: |\n  {run}\n"
    )
    done = rehearse(
        "task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result.json", "--keep", "kept", cwd=tmp_path
    )
    if launcher in ONCE:
        assert re.search(r"^exit 9\b", done.stdout, flags=re.M), done.stdout + done.stderr
    else:
        assert is_exact(done), done.stdout + done.stderr
    assert json.loads((tmp_path / "kept" / "reference" / "bucket" / "result.json").read_text()) == 120.0 * 120
    assert leftovers(tmp_path) == []


@pytest.mark.slow  # Two processes import torch.
def test_the_error_of_a_rank_is_told_from_its_peers_and_from_torchruns_summary(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch.distributed as dist\n\ndist.init_process_group('gloo')\nif dist.get_rank() == 1:\n"
        "    raise ValueError('no such sample')\ndist.barrier()\n"
    )
    run = f"torchrun --nproc_per_node=2 --master_port={free_port()} train.py"
    (tmp_path / "task.yaml").write_text(f"workdir: .\nrun: |\n  {run}\n")
    done = rehearse("task.yaml", cwd=tmp_path)
    assert done.returncode == 1
    error = "  rank 1: ValueError: no such sample\n    train.py, line 5: raise ValueError('no such sample')\n"
    assert f"\nexit 1\n{error}  its whole output: " in done.stdout, done.stdout


# -- runs that do not end, end too soon, or end at the warning


@pytest.mark.slow
def test_a_script_that_does_not_end_is_stopped_and_said(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "envs: {OUT: /checkpoints/own}\n"
        "file_mounts:\n  /checkpoints: {name: bbb, mode: MOUNT}\n"
        f"  ~/endless.py: {PROGRAMS}/scripts/endless.py\nrun: python ~/endless.py\n"
    )
    done = rehearse("task.yaml", "--timeout", "4s", "--compare", "own/*", "--json", cwd=tmp_path)
    assert done.returncode == 1
    [leg] = json.loads(done.stdout)["legs"]
    first, second, *_ = leg["verdict"]["text"].splitlines()
    assert first == "not checked: does not end. Train fewer steps, or give it more time: --timeout 2h"
    assert second.startswith("stopped after 4 s, it had not ended")
    assert not leg["verdict"]["checked"]
    assert leg["rows"][-1]["timed_out"]
    assert leftovers(tmp_path) == [str(Path(leg["log"]).parent)]


@pytest.mark.slow
def test_an_attempt_that_hangs_after_a_preemption_is_not_exact(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        "run: |\n  [ ! -e /checkpoints/began ] || exec sleep 600\n"
        "  echo > /checkpoints/began\n  sleep 1\n  echo x > /checkpoints/result\n"
    )
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result", "--timeout", "6"]
    done = rehearse(*args, cwd=tmp_path)
    assert done.returncode == 1
    stopped = r"stopped after 6 s, it had not ended; the undisturbed run took [\d.]+ s\n"
    assert re.search(rf"NOT exact: the run never finished\. Before it failed: killed\.\n{stopped}", done.stdout)


@pytest.mark.parametrize(
    ("timeout", "reference", "first_write", "limit"),
    [
        (None, 0.0, 0.0, 1800.0),
        (None, 0.0, 100.0, 1800.0),
        (None, 0.0, 900.0, 9000.0),
        (None, 10.0, 900.0, 1800.0),
        (None, 100.0, 0.0, 1800.0),
        (None, 300.0, 0.0, 3000.0),
        (7.0, 0.0, 900.0, 7.0),
        (7.0, 100.0, 0.0, 7.0),
    ],
)
def test_how_long_an_attempt_may_run(timeout: float | None, reference: float, first_write: float, limit: float) -> None:
    assert limit_s(timeout, reference_s=reference, first_write_s=first_write) == limit


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("90", 90, "90 s"),
        ("0.5s", 0.5, "0.5 s"),
        ("30m", 1800, "30 min"),
        (" 2h", 7200, "2 h"),
        ("1.5h", 5400, "90 min"),
        ("1d", 86400, "24 h"),
    ],
)
def test_a_duration_is_read_and_shown(text: str, seconds: float, shown: str) -> None:
    assert read_duration("--timeout", text) == seconds
    assert format_duration(seconds) == shown


@pytest.mark.parametrize("text", ["", "0", "0m", "-1", "1w", "h", "1h30", "nan"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a duration, like 90s, 30m or 2h"):
        read_duration("--timeout", text)


@pytest.mark.parametrize(
    ("had", "known", "written_s", "said"),
    [
        (
            2, Pace("steps", 60, 30), 0.0,
            "it ended after 2 of 5 preemptions: 300 steps are enough, its saves come every 30; "
            "or ask for fewer: --preemptions 2",
        ),
        (
            0, Pace("steps", 0, None), 0.0,
            "no step logged a loss, which tells where to strike: call `run.log(loss=loss)` in the loop",
        ),
        (
            0, Pace("steps", 60, 2), 0.0,
            "it ended after 0 of 5 preemptions: 360 steps are enough, its saves come every 2",
        ),
        (
            3, Pace("steps", 60, None), 0.0,
            "it ended after 3 of 5 preemptions: 180 steps are enough, it has 60; or ask for fewer: --preemptions 3",
        ),
        (
            1, Pace("epochs", 3, 1), 0.5,
            "it ended after 1 of 5 preemptions: 10 epochs are enough, its saves come every 1; "
            "or ask for fewer: --preemptions 1",
        ),
        (
            2, Pace("saves", 4, 1), 0.5,
            "it ended after 2 of 5 preemptions: 10 saves are enough, it makes 4; or ask for fewer: --preemptions 2",
        ),
        (
            2, None, 0.5,
            "it ended after 2 of 5 preemptions: it takes 4.0 s, 3.5 s of them before its first write to the "
            "bucket; 16 s are enough; or ask for fewer: --preemptions 2",
        ),
        (0, None, 0.0, "it ended after 0 of 5 preemptions: it takes 4.0 s; 48 s are enough"),
    ],
)  # fmt: skip
def test_a_run_that_is_too_short_is_told_what_is_enough(
    had: int, known: Pace | None, written_s: float, said: str
) -> None:
    assert too_short(had, 5, known=known, seconds=4.0, written_s=written_s) == said


def numbered(template: str, every: int, last: int) -> Learnt:
    def trains(fs: Fs) -> None:
        for step in range(1, last + 1):
            fs.tick()
            if step % every == 0:
                fs.write(template.format(step), step)

    return study(Fs().attempt(trains))


@pytest.mark.parametrize(
    ("template", "every", "known"),
    [
        ("step_{}.pt", 30, Pace("steps", 120, 30)),
        ("checkpoint-{}/model.pt", 30, Pace("steps", 120, 30)),
        ("epoch_{}.pt", 1, Pace("epochs", 120, 1)),
        ("last.pt", 30, Pace("saves", 4, 1)),
        ("last.pt", 120, None),
    ],
)
def test_the_pace_of_a_run_without_records_is_that_of_its_saves(template: str, every: int, known: Pace | None) -> None:
    assert pace(numbered(template, every, 120)) == known


@pytest.mark.slow
def test_a_task_that_is_over_too_soon_is_said(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        "run: |\n  echo > /checkpoints/result\n  case $SKYPILOT_TASK_ID in *-reference-*) sleep 2;; esac\n"
    )
    done = rehearse("task.yaml", "--kinds", "kill", "--preemptions", 2, "--compare", "result", cwd=tmp_path)
    assert done.returncode == 1
    assert "not checked: it ended after 0 of 2 preemptions: it takes " in done.stdout


def test_a_script_that_finishes_its_work_at_sigterm_has_finished(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        "run: |\n  trap 'echo x > /checkpoints/result; exit 0' TERM\n  echo > /checkpoints/began\n"
        "  for i in $(seq 20); do sleep 0.05; done\n  echo x > /checkpoints/result\n"
    )
    done = rehearse("task.yaml", "--kinds", "sigterm", "--preemptions", 1, "--compare", "result", cwd=tmp_path)
    assert "1  finished before the machine was taken" in done.stdout, done.stdout
    assert "exited with 0" not in done.stdout


ASKS = """\
python - <<'END'
import os, time, urllib.error, urllib.request
url = os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] + "/latest/"
ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
token = urllib.request.urlopen(urllib.request.Request(url + "api/token", method="PUT", headers=ttl)).read().decode()
while True:
    try:
        headers = {"X-aws-ec2-metadata-token": token}
        urllib.request.urlopen(urllib.request.Request(url + "meta-data/spot/instance-action", headers=headers))
        break
    except urllib.error.HTTPError:
        time.sleep(0.05)
END
"""


@pytest.mark.parametrize(
    ("run", "complete", "said"),
    [
        ("sleep 1\n", False, "finished before the machine was taken"),
        (ASKS, True, "finished before the machine was taken"),
        (ASKS, False, "exited with 0 at the notice"),
    ],
    ids=["it never asked", "all is done", "it left"],
)
def test_only_a_script_that_heard_of_the_notice_left_at_it(tmp_path: Path, run: str, complete: bool, said: str) -> None:
    task = read_task("run: unused\n", tmp_path, {}, None)
    with AwsMetadata() as server, View(quiet=True) as view:
        taken = Machine(task, tmp_path / "r" / "leg" / "m", {}, server.env)
        taken.start(run)
        watch = Watch(tmp_path / "bucket", None)
        planned = faults.Preemption("aws-notice", at_fraction=0.1)
        # The notice is as long as 10 s, as in an undisturbed run of 100 s.
        injector = Injector(planned, taken, watch, server, view, 100.0, 100.0, False, lambda: complete)
        row, code = injector.take(1, 1)
        taken.take()
    assert code == 0
    assert row.ended.startswith(said)
