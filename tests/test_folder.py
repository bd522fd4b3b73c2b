"""Checkpoints that a framework writes as files: committed, verified and fetched like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import PROGRAMS, Ended, event, launch, losses

from trainer.layout.names import RunPaths, list_checkpoints

SCRIPT = PROGRAMS / "files_loop.py"
LOSSES = {step: step * (step + 1) // 2 for step in range(1, 13)}


def toy(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    return launch(SCRIPT, "--dir", run_dir, *args, processes=processes)


def exported(run_dir: Path) -> object:
    return json.loads((run_dir / "final" / "value.json").read_text())


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
