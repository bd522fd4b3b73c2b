"""What rank 0 writes beside the checkpoints."""

import json
import threading
import time
from pathlib import Path

import pytest

from trainer.attempt.record import open_attempt
from trainer.bucket.hashing import hash_file
from trainer.layout.events import read_events, read_metrics
from trainer.layout.names import RunPaths
from trainer.machine import place
from trainer.training.journal import Journal


def test_an_evaluation_at_a_boundary_that_was_cut_writes_over_nothing(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    attempt = open_attempt(paths, launch="l", config={}, binding={})
    records = Journal(attempt)
    for step in (1, 2):
        records.line({"step": step, "loss": 1.0})
        records.cut()
        records.line({"step": step, "eval_loss": 2.0})
    records.line({"step": 3, "loss": 1.0})
    records.cut()
    history = records.history_until(3).result(10)
    assert len({part["path"] for part in history}) == len(history)
    assert [part["hash"] for part in history] == [hash_file(paths.root / part["path"]) for part in history]
    lines = [line for part in history for line in read_metrics((paths.root / part["path"]).read_bytes())]
    assert [(line["step"], "loss" in line) for line in lines] == [
        (1, True),
        (1, False),
        (2, True),
        (2, False),
        (3, True),
    ]


def test_an_attempt_records_its_place_and_the_clock_that_nothing_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "gpus" / "0000:00:1e.0"
    driver.mkdir(parents=True)
    (driver / "information").write_text("Model: \t\t NVIDIA A100-SXM4-40GB\nIRQ:   \t\t 53\n")
    monkeypatch.setattr(place, "_DRIVER", driver.parent)
    info = {"cluster_name": "c", "cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a"}
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", json.dumps(info))
    monkeypatch.setenv("SKYPILOT_NUM_NODES", "2")
    monkeypatch.setenv("SKYPILOT_NUM_GPUS_PER_NODE", "8")
    monkeypatch.setenv("SKYSPOT_LAUNCHED_AT", repr(time.monotonic() - 5))
    before, paths = time.monotonic(), RunPaths(tmp_path / "run")
    attempt = open_attempt(paths, launch="l", config={}, binding={})
    (event,) = read_events(paths, attempt.name)
    assert before - 0.001 <= event.fields["monotonic"] <= time.monotonic()
    assert 5 <= event.fields["launched_s"] < 60
    assert event.fields["place"] == {
        "cloud": "AWS", "region": "us-east-1", "zone": "us-east-1a", "cluster": "c", "nodes": 2,
        "accelerators_per_node": 8, "accelerator": "NVIDIA A100-SXM4-40GB",
    }  # fmt: skip
    for odd in ("", "[]", "null", "{", '{"cloud": null, "region": [1]}'):
        monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", odd)
        assert "cloud" not in place.place()


def test_what_a_save_asks_for_while_the_records_end_is_answered(tmp_path: Path) -> None:
    """The attempt may end, in a notebook, while a save is under way: its thread must not wait for ever."""
    attempt = open_attempt(RunPaths(tmp_path / "run"), launch="l", config={}, binding={})
    records, go_on = Journal(attempt), threading.Event()
    records.line({"step": 1, "loss": 1.0})
    records.cut()
    records._do(lambda: go_on.wait(60) and None)
    records.end()
    found: list[object] = []
    save = threading.Thread(target=lambda: found.append(records.history_until(1).result(60)), daemon=True)
    save.start()
    go_on.set()
    save.join(60)
    assert [part["last_step"] for part in found[0]] == [1]  # type: ignore[attr-defined]
