"""Checkpoints that a framework writes as files: committed, verified and fetched like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from in_process import Attempts
from needs import NOT_HERE
from safetensors.torch import load_file
from support import PROGRAMS, Ended, event, launch, losses

from bench.worker import peak_bytes, reset_peak
from trainer import SpotRun
from trainer.checkpoint.shards import Part
from trainer.checkpoint.writing import write_share
from trainer.layout.names import RunPaths, list_checkpoints

SCRIPT = PROGRAMS / "files_loop.py"
LOSSES = {step: step * (step + 1) // 2 for step in range(1, 13)}


def toy(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    return launch(SCRIPT, "--dir", run_dir, *args, processes=processes)


def exported(run_dir: Path) -> object:
    return json.loads((run_dir / "final" / "value.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_struck_goes_on_from_its_files(tmp_path: Path, processes: int) -> None:
    run = tmp_path / "run"
    assert toy(run, "--strike", "2:SIGTERM", processes=processes).code == 75  # Before the first regular save.
    assert event(run, "end")["committed_step"] == 2
    assert toy(run, "--strike", "7:SIGKILL", processes=processes).code == 75
    torn = RunPaths(run).checkpoint(list_checkpoints(RunPaths(run))[0])
    share = next(torn.glob("share-*"))
    share.write_bytes(share.read_bytes()[:-9])
    struck = toy(run, "--strike-in-evaluation", 9, processes=processes)
    assert struck.code == 75, struck.output
    assert f"Checkpoint {torn.name} is not whole" in struck.output
    assert event(run, "restored")["step"] == 2
    assert event(run, "end")["committed_step"] == 9
    parts = " ".join(f"parts/{rank}.json" for rank in range(processes))
    assert f"files: common.bin empty {parts}" in struck.output
    done = toy(run, processes=processes)
    assert done.code == 0, done.output
    assert event(run, "restored")["step"] == 9
    assert losses(run) == LOSSES
    assert exported(run) == [78, list(range(1, 13))]
    again = toy(run, processes=processes)
    assert again.code == 0
    assert "already finished" in again.output
    assert "after the block: 78" in again.output


def test_a_killed_first_attempt_and_a_file_of_two_ranks_are_no_trouble(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert toy(run, "--strike", "3:SIGKILL").code == 75
    assert not list_checkpoints(RunPaths(run))
    assert toy(run, "--strike", "6:SIGTERM", "--both-write", processes=2).code == 75
    done = toy(run)
    assert done.code == 0, done.output
    assert "files: common.bin empty parts/0.json parts/1.json" in done.output
    assert losses(run) == LOSSES


def test_the_files_of_another_framework_are_refused(tmp_path: Path) -> None:
    assert toy(tmp_path / "run", "--until", 4).code == 0
    other = toy(tmp_path / "run", "--framework", "another")
    assert other.code == 1
    assert "was saved by toy, not by another. Start a new run" in other.output
    assert "Traceback" not in other.output


def test_the_files_take_no_memory_while_they_are_copied(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip(f"the process's peak: {NOT_HERE}: no /proc/self/clear_refs")
    blocks, before = [bytes([number]) * (1 << 20) for number in range(48)], 0
    blocks.append(b"the rest")

    def script(run: SpotRun, _: object) -> None:
        def write(folder: Path) -> Path:
            nonlocal before
            with (folder / "weights.bin").open("wb") as file:
                file.writelines(blocks if run.step == 2 else blocks[:1])
            reset_peak()
            before = peak_bytes()
            return folder

        loop = run._framework_loop("toy")
        assert run.resume_from() is None
        loop.begin(write, 2)
        while run.step < 2:
            loop.start_step()
            loop.end_step()
            loop.save()
        run.finish(lambda folder: (folder / "done").touch())

    assert Attempts(tmp_path).one(script) == 0
    assert peak_bytes() - before < 20 << 20
    newest = RunPaths(tmp_path).checkpoint(list_checkpoints(RunPaths(tmp_path))[0])
    saved = load_file(newest / "share-00000.safetensors")["file.weights.bin"]
    assert saved.numpy().tobytes() == b"".join(blocks)


def test_a_file_that_is_cut_short_while_it_is_copied_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    with path.open("rb", buffering=0) as file, pytest.raises(OSError, match=r"file' has lost its last 2 bytes"):
        write_share(tmp_path / "share", [Part("file", torch.uint8, (12,), (0,), (12,), (0,))], lambda _: file)
