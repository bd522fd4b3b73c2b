"""How a save goes: beside training, without memory, of a model that meddles, kept for good; how often."""

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from bucket_lab import until
from safetensors.torch import load_file
from support import PROGRAMS, REPO, clean_env, event, losses, mlp, weights
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer.bucket.verify import problem
from trainer.checkpoint import staging
from trainer.checkpoint.interval import Costs, Lives, Pace, choose, notice_seconds
from trainer.checkpoint.shards import Part, parts_of
from trainer.layout.events import read_events
from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_attempts, list_checkpoints


def test_without_memory_for_a_copy_training_waits_and_it_is_said(tmp_path: Path, undisturbed) -> None:
    ended = mlp(tmp_path / "run", "--constant", "checkpoint.staging.RESERVE_BYTES=1e17", processes=2)
    assert ended.code == 0, ended.output
    assert ended.output.count("Not enough memory to stage") == 1
    assert [name.step for name in list_checkpoints(RunPaths(tmp_path / "run"))] == [12, 8, 4]
    # Step 8's, that was written from the live tensors, leads to the same end.
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(RunPaths(tmp_path / "run").checkpoint(list_checkpoints(RunPaths(tmp_path / "run"))[0]))
    assert mlp(tmp_path / "run", processes=2).code == 0
    assert losses(tmp_path / "run") == losses(undisturbed(2))
    assert weights(tmp_path / "run") == weights(undisturbed(2))


def test_a_model_that_changes_its_weights_while_they_are_copied_is_not_saved_torn(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # The copy is held up until the next forward pass has meddled with what it copies.
    ended = mlp(run_dir, "--meddle", "--hold-copy", "--steps", "12", "--save-every", "2")
    assert ended.code == 0, ended.output
    assert ended.output.count("changed while it was copied") == 1
    saved = [dict(found.fields)["step"] for found in read_events(RunPaths(run_dir), *list_attempts(RunPaths(run_dir)))
             if found.name == "saved"]  # fmt: skip
    assert saved == [4, 6, 8, 10, 12]


def test_an_average_of_the_weights_is_resumed_exactly_and_not_lost(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert mlp(whole, "--ema").code == 0
    assert mlp(broken, "--ema", "--fault", "kill@6", "--commit-first").code != 0
    forgotten = mlp(broken)
    assert forgotten.code == 1
    assert "has extra 'ema', which is not registered and would be lost" in forgotten.output
    assert "Traceback" not in forgotten.output
    assert mlp(broken, "--ema").code == 0
    averages = [
        {name: tensor.numpy().tobytes() for name, tensor in tensors.items() if name.startswith("extra.ema.")}
        for tensors in (saved_last(whole), saved_last(broken))
    ]
    assert len(averages[0]) > 10
    assert averages[0] == averages[1]


def test_an_average_of_the_weights_is_not_made_up(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert mlp(plain, "--fault", "kill@6", "--commit-first").code != 0
    made_up = mlp(plain, "--ema")
    assert made_up.code == 1
    assert "extra 'ema' is registered, but checkpoint" in made_up.output
    assert "Traceback" not in made_up.output


def saved_last(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = RunPaths(run_dir).checkpoint(list_checkpoints(RunPaths(run_dir))[0])
    return load_file(folder / "share-00000.safetensors")


def test_memory_for_copies_is_there_before_the_first_save() -> None:
    """What is handed out while a save copies would hold training up; what lies there already stays."""
    parts = [Part("a", torch.uint8, (64 << 20,), (0,), (64 << 20,), (0,))]
    memory = staging.Staging()
    assert memory.allocate(parts)
    before = resident_bytes()
    live = {"a": torch.full((64 << 20,), 7, dtype=torch.uint8)}
    copied = memory.begin(parts, live, live.keys())
    copied.run()
    assert resident_bytes() - before > 120 << 20, "the copy, and what was copied"
    memory.populate()
    assert copied.fetch(parts[0]).eq(7).all()
    fresh = staging.Staging()
    assert fresh.allocate(parts)
    before = resident_bytes()
    fresh.populate()
    assert resident_bytes() - before > 60 << 20


@pytest.mark.parametrize("cut", [False, True])
def test_a_tensor_that_is_changed_while_it_is_copied_is_noticed_cut_over_ranks_or_not(cut: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = torch.ones(4)
        if cut:
            weight = distribute_tensor(weight, DeviceMesh("cpu", [0]), [Shard(0)])
        live, memory = {"weight": weight}, staging.Staging()
        parts = parts_of(live, 1)
        assert memory.allocate(parts)
        untouched = memory.begin(parts, live, live.keys())
        untouched.run()
        assert untouched.torn is None
        copy = memory.begin(parts, live, live.keys())
        weight.mul_(7)
        copy.run()
        assert copy.torn == "weight"
    finally:
        dist.destroy_process_group()


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_checkpoints_of_every_so_many_steps_are_kept_for_good(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = mlp(run_dir, "--save-every", "1", "--keep-latest", "2", "--keep-every", "5", "--slow", "0.03")
    assert ended.code == 0, ended.output
    steps = {name.step for name in list_checkpoints(RunPaths(run_dir))}
    assert {5, 10, 11, 12} <= steps
    assert steps.isdisjoint({1, 2, 3, 4})


def test_the_end_of_a_run_waits_for_what_follows_each_of_its_saves(tmp_path: Path) -> None:
    """The read-back of the last save but one ends after the last save: it prunes all the same."""
    run_dir = tmp_path / "run"
    assert mlp(run_dir, "--fault", "kill@5", "--commit-first").code != 0
    ended = mlp(run_dir, "--keep-latest", "2", "--late-read-back", "1")
    assert ended.code == 0, ended.output
    assert event(run_dir, "restored")["step"] == 4
    assert [name.step for name in list_checkpoints(RunPaths(run_dir))] == [12, 8]


@pytest.mark.slow
def test_the_interval_sets_itself_and_says_why(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    auto = ("--save-every", "auto", "--steps", "60", "--constant", "checkpoint.interval.FIRST_S=0.05")
    first = mlp(run_dir, *auto, "--fault", "kill@45", "--slow", "0.02", "--late-check", processes=2)
    assert first.code != 0
    said = [line for line in first.output.splitlines() if line.startswith("a checkpoint every")]
    assert said
    assert "(0 seen in" in said[0]
    assert "prior: one per 2 h" in said[0]
    chosen = event(run_dir, "interval")
    assert chosen["steps"]
    second = mlp(run_dir, *auto, processes=2)
    assert second.code == 0, second.output
    said = [line for line in second.output.splitlines() if line.startswith("a checkpoint every")]
    assert "(1 seen in" in said[0]  # What the attempts before found holds from the start.


@pytest.mark.parametrize(
    ("costs", "lives", "steps"),
    [
        # FACTS: M = 2 h: a stall of 1 s -> 120 s; of 30 s -> 657 s.
        (Costs(1.0, 1.0, 2.0), Lives(0.0, 0), 120),
        (Costs(1.0, 30.0, 31.0), Lives(0.0, 0), 657),
        (Costs(0.5, 1.0, 2.0), Lives(0.0, 0), 240),
        (Costs(1.0, 1.0, 100.0), Lives(0.0, 0), 200),  # At least twice what a save takes.
        (Costs(1.0, 1.0, 2.0), Lives(7200.0, 3), 85),  # Preempted every hour.
        (Costs(900.0, 1.0, 2.0), Lives(0.0, 0), 1),
    ],
)
def test_the_interval_is_youngs_and_dalys(costs: Costs, lives: Lives, steps: int) -> None:
    assert choose(costs, lives, 120.0).steps == steps


def test_a_save_that_does_not_fit_the_notice_is_said() -> None:
    assert "a notice of 30 s may be too short" in choose(Costs(1.0, 1.0, 20.0), Lives(0.0, 0), 30.0).why
    assert "may be too short" not in choose(Costs(1.0, 1.0, 20.0), Lives(0.0, 0), 120.0).why


@pytest.mark.parametrize(("cloud", "seconds"), [("AWS", 120), ("Kubernetes", 30), ("RunPod", 5), ("Slurm", 25)])
def test_the_notice_is_the_clouds_or_else_the_grace(monkeypatch, cloud: str, seconds: float) -> None:
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", json.dumps({"cloud": cloud}))
    assert notice_seconds(25.0) == seconds


def test_a_save_costs_the_wait_and_what_the_steps_beside_it_are_slower() -> None:
    pace = Pace()
    for seconds in (1.0, 1.1, 0.9, 1.0):
        pace.step(seconds, beside_a_save=False)
    for seconds in (1.25, 1.15):
        pace.step(seconds, beside_a_save=True)
    assert pace.saved(0.1, 0.15, 3.0).cost_s == pytest.approx(0.5)
    assert pace.saved(0.1, 0.15, 3.0).cost_s == pytest.approx(0.15)


@pytest.mark.slow
def test_a_save_commits_after_home_and_the_payload_were_deleted(tmp_path: Path) -> None:
    home, run_dir = tmp_path / "home", tmp_path / "run"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "env"], check=True)
    [packages] = home.glob("env/lib/python3*/site-packages")
    packages.rmdir()
    packages.symlink_to(sysconfig.get_paths()["purelib"])
    shutil.copytree(REPO / "trainer", home / "skyspot" / "trainer")
    shutil.copy(PROGRAMS / "mlp.py", home / "mlp.py")
    process = subprocess.Popen(
        [home / "env/bin/python", "-m", "trainer.launch", home / "mlp.py", "--dir", run_dir, "--steps", "100000",
         "--save-every", "100000"],
        env=clean_env(HOME=str(home), PYTHONPATH=str(home / "skyspot")), cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until("the first step is done", lambda: process.poll() is not None or event_if_any(run_dir, "first-step"), 60)
    shutil.rmtree(home)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    ended = event(run_dir, "end")
    assert ended["committed_step"] == ended["step"]
    paths = RunPaths(run_dir)
    [name] = list_checkpoints(paths)
    assert problem(paths.checkpoint(name), read_manifest(paths.checkpoint(name))) is None


def event_if_any(run_dir: Path, name: str) -> dict[str, object]:
    return event(run_dir, name) if list_attempts(RunPaths(run_dir)) else {}


def test_each_gpu_that_has_state_has_a_stream_that_waits_for_its_own_computation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream:
        def __init__(self, gpu: object = "cuda:0") -> None:
            self.of, self.after = str(gpu), list[str]()

        def wait_stream(self, other: "Stream") -> None:
            self.after.append(other.of)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    tensors: list[Any] = [SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda:1", "cuda:1", "cuda:2")]
    streams = staging._behind_the_computation(tensors)
    assert sorted((one.of, *one.after) for one in streams) == [("cuda:1", "cuda:1"), ("cuda:2", "cuda:2")]
    assert staging._behind_the_computation(tensors[:1]) == []
