"""Helpers of many tests: run a program under the launcher, and read what it left in its run's folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import warm

from skyspot.rehearsal.metadata import AwsMetadata
from trainer.layout.events import event_named, read_events, read_metrics
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_attempts, list_checkpoints

REPO = Path(__file__).resolve().parent.parent
PROGRAMS = REPO / "tests" / "programs"


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


SET_BY_LIBRARIES = ("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK")
"""What accelerate and torch set in the tests' process: with it, no program could be started warm."""


def clean_env(**more: str) -> dict[str, str]:
    """This process's environment without variables that steer the trainer, and with PYTHONPATH on the repository.

    No metadata service is looked for: the machine that runs the tests may belong to a cloud.
    """
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SKYSPOT_", "SKYPILOT_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_", "AWS_"))
        and key not in SET_BY_LIBRARIES
    }
    return {**kept, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "SKYSPOT_CLOUD": "none", **more}


BY_THE_SECOND = json.dumps(
    [{"rung": 1, "spot": True, "machines": ["CPU"], "on_demand": 7200.0, "places": {"": [3600.0, 7200.0, "x"]}}]
)
"""A dollar a second, so that a limit in USD is one in seconds."""


def limit_variables(**limits: object) -> dict[str, str]:
    """The variables of a task with limits, by the names of their options: `max_spend=900`."""
    more = {f"SKYSPOT_{name.upper()}": str(value) for name, value in limits.items()}
    return {"SKYSPOT_PRICES": BY_THE_SECOND, "SKYSPOT_SPEND_ALLOWANCE": "0", **more}


def launch(
    *args: object, processes: int = 1, grace: float = 25, env: dict[str, str] | None = None, timeout: float = 150
) -> Ended:
    """Run a program of tests/programs under the launcher to its end.

    A process has one thread unless `env` sets another number. With two threads an attempt takes half as many CPU
    seconds again: the models are small, and the threads wait for each other. More threads can also sum in another
    order than the runs that other tests compare with.
    """
    env = {"OMP_NUM_THREADS": "1", **(env or clean_env())}
    options = ["--processes", str(processes), "--grace", str(grace)]
    command = [sys.executable, "-m", "trainer.launch", *options, *map(str, args)]
    done = warm.run(command, capture_output=True, text=True, timeout=timeout, env=env, start_new_session=True)
    return Ended(done.returncode, done.stdout + done.stderr)


def noticed(*args: object, processes: int = 1) -> Ended:
    """Run a program, send it a cloud's notice where it waits for one, and SIGTERM while it holds after its save."""
    command = [sys.executable, "-m", "trainer.launch", "--processes", str(processes), *map(str, args)]
    lines = []
    with AwsMetadata() as server:
        env = clean_env(**server.env, SKYSPOT_NOTICE_POLL_S="0.02", OMP_NUM_THREADS="1")
        with warm.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                lines.append(line)
                if "waiting for a notice" in line:
                    server.announce(120)
                if "holding until this machine is taken" in line:
                    process.send_signal(signal.SIGTERM)
    return Ended(process.returncode, "".join(lines))


def assert_holds(process: subprocess.Popen[str]) -> None:
    """One that does not hold leaves at once; a slow machine can only hide that."""
    with suppress(subprocess.TimeoutExpired):
        raise AssertionError(f"it left with {process.wait(0.5)}")


def mlp(run_dir: Path, *args: object, **options: object) -> Ended:
    """Run one attempt of tests/programs/mlp.py, with the faults of faulty.py."""
    return launch(PROGRAMS / "faulty.py", "--dir", run_dir, *args, **options)  # type: ignore[arg-type]


def train(*args: object, env: dict[str, str] | None = None, timeout: float = 200) -> Ended:
    """Run one attempt of the bundled trainer, with one thread per process."""
    command = [sys.executable, "-m", "trainer", *map(str, args)]
    env = env or clean_env(OMP_NUM_THREADS="1")
    done = warm.run(command, capture_output=True, text=True, timeout=timeout, env=env, start_new_session=True)
    return Ended(done.returncode, done.stdout + done.stderr)


def history(run_dir: Path) -> list[dict[str, object]]:
    """The lines of metrics that the newest manifest lists, from step 1 on; others do not count."""
    paths = RunPaths(run_dir)
    for name in list_checkpoints(paths):
        manifest = read_manifest(paths.checkpoint(name))
        lines = []
        for part in manifest.facts["metrics"]:
            lines += list(read_metrics((run_dir / part["path"]).read_bytes()))
        return lines
    return []


def losses(run_dir: Path) -> dict[int, object]:
    """Loss by step, from the lines that count; fails if a step appears twice."""
    found: dict[int, object] = {}
    for line in history(run_dir):
        if "loss" in line:
            assert line["step"] not in found, f"step {line['step']} appears twice in the history"
            found[int(str(line["step"]))] = line["loss"]
    return found


def column(run_dir: Path, key: str) -> list[object]:
    """One value from each step's line."""
    return [line[key] for line in history(run_dir) if "loss" in line]


def weights(run_dir: Path) -> dict[str, bytes]:
    """The exported tensors, as bytes, by name."""
    found = {}
    for path in sorted((run_dir / "final").glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = data[8 + length + start : 8 + length + end]
    return found


def event(run_dir: Path, name: str, attempt: int = -1) -> dict[str, object]:
    """The fields of an attempt's last event of that name; empty if there is none."""
    paths = RunPaths(run_dir)
    attempts = list_attempts(paths)
    return dict(event_named(read_events(paths, attempts[attempt]), name) or {})


def assert_resumed(run_dir: Path) -> None:
    """Each attempt began where the one before committed at its stop; a seeded program that starts over ends alike."""
    for attempt in range(len(list_attempts(RunPaths(run_dir))) - 1):
        if committed := event(run_dir, "end", attempt).get("committed_step"):
            assert int(str(event(run_dir, "restored", attempt + 1).get("step", 0))) >= int(str(committed))
