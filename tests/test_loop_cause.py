"""A rehearsal of a loop of the user's own names the rule that the loop breaks, from the records of both runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from skyspot.rehearsal import levels, remedies, verdict
from skyspot.rehearsal.loop_record import LoopRecord, read_loop_record
from trainer.layout.manifest import Manifest
from trainer.layout.names import RunPaths

STEPS, RESUMED = 10, 5
OBJECTS = {"model": "Model", "optimizer": "AdamW"}


def history(
    changes: dict[str, Any] | None = None, first: int = RESUMED + 1, last: int = STEPS, **record: Any
) -> verdict.History:
    """A run of a loop of the user's own, with other metrics from a step on."""
    lines = {
        step: {"step": step, "loss": 5.0 / step, "lr": 0.1 / step, "batch": f"b{step}",
               "streams": {"torch": f"t{step}", "numpy": "unseeded"}, "rates": {"optimizer": 0.1 / step},
               "seen": 4 * step, "tokens_per_s": step + first}
        for step in range(1, last + 1)
    }  # fmt: skip
    for step in range(first, last + 1):
        lines[step] |= changes or {}
    loop = LoopRecord("steps", OBJECTS, **{"resumes": (RESUMED,), **record})
    return verdict.History(lines, {"a": b"1"}, {}, loop=loop)


OTHER_STREAMS = {"loss": 9.0, "streams": {"torch": "x", "numpy": "unseeded"}}
OTHER_RATE = {"loss": 9.0, "lr": 0.5, "rates": {"optimizer": 0.5}}


@pytest.mark.parametrize(
    ("left", "right", "says", "finding"),
    [
        (history(), history(OTHER_RATE), "the learning rate differs from step 6 on, the first after the resume from "
         "step 5 (0.0166667 undisturbed, 0.5 preempted): is the scheduler registered?", remedies.UNSCHEDULED),
        (history(), history(OTHER_RATE, 7), "from step 7 on, 2 steps after the resume from step 5",
         remedies.UNSCHEDULED),
        (history(), history(OTHER_RATE, scheduled=("optimizer",)), "0.5 preempted): its scheduler is registered; is it "
         "stepped, or the rate set, outside the loop?", remedies.UNSCHEDULED),
        (history(), history(OTHER_RATE, scheduled=("other",)), "is the scheduler registered?", remedies.UNSCHEDULED),
        (history(), history({"seen": 0}, unsaved=("ema.count",)), "the logged seen differs from step 6 on, the first "
         "after the resume from step 5; ema.count changes during training", remedies.UNSAVED),
        (history(), history({"loss": 9.0}), "something that steps change is not registered. Registered: model (Model), "
         "optimizer (AdamW)", remedies.UNREGISTERED),
        (history(), history({"loss": 9.0}, unsaved=("ema.count",)), "ema.count changes during training and is in no "
         "state_dict", remedies.UNSAVED),
        (history(), history({"loss": 9.0, "batch": "x"}), "the batches differ from step 6", remedies.BATCHES),
        (history(), history(OTHER_STREAMS), "random numbers of torch differ from step 6", remedies.STREAMS),
        (history({"batch": None}), history({"loss": 9.0, "batch": None}), "not registered", remedies.UNREGISTERED),
        (history(), history({"seen": 0}), "the logged seen differs from step 6", remedies.UNSTATED),
        (history(), history(last=8), "the undisturbed run ended at step 10, this one at step 8", remedies.UNSTATED),
        (history(), history(OTHER_STREAMS, 1, resumes=()), "is the script seeded?", remedies.SEEDS),
        (history(), history({"loss": 9.0}, 4, resumes=()), "step 4 gives another result with the same random numbers",
         remedies.NONDETERMINISTIC),
    ],
)  # fmt: skip
def test_a_difference_names_the_rule(
    left: verdict.History, right: verdict.History, says: str, finding: remedies.Finding
) -> None:
    found = verdict.compare(left, right)
    assert found.text.startswith("NOT exact: ")
    assert says in found.text
    assert found.remedy == finding.remedy


def test_data_that_do_not_come_from_run_steps_are_named() -> None:
    left, right = history(), history({"loss": 9.0})
    for line in (*left.lines.values(), *right.lines.values()):
        del line["batch"]
    assert verdict.compare(left, right).remedy == remedies.ELSEWHERE.remedy


@pytest.mark.parametrize(("unsaved", "finding"), [((), remedies.UNREGISTERED), (("ema.n",), remedies.UNSAVED)])
def test_weights_alone_that_differ_are_named(unsaved: tuple[str, ...], finding: remedies.Finding) -> None:
    right = history(unsaved=unsaved)
    right.weights["a"] = b"2"
    found = verdict.compare(history(), right)
    assert "a differs in the exported model, and no loss does" in found.text
    assert found.remedy == finding.remedy


def test_logged_metrics_count_but_for_the_clock_and_what_is_ignored() -> None:
    assert verdict.compare(history(first=3), history()).exact, "tokens_per_s differs"
    other = history({"seen": 0})
    assert not verdict.compare(history(), other).exact
    assert verdict.compare(history(), other, ("seen",)).exact
    left, right = (verdict.History(one.lines, one.weights, {}) for one in (history(), other))
    assert verdict.compare(left, right).exact, "the bundled trainer's lines have more"


@pytest.mark.parametrize(
    ("loop", "changes", "says", "finding"),
    [
        ("transformers", {"loss": 9.0}, "with the same learning rate and the same batches: something that steps change "
         "is not in the checkpoint of the Trainer (a callback's counter, an EMA)", remedies.KEPT_APART),
        ("lightning", {"loss": 9.0}, "not in the checkpoint of Lightning", remedies.KEPT_APART),
        ("lightning", OTHER_RATE, "does Lightning save the scheduler, or what else sets the rate?",
         remedies.KEPT_APART),
        ("transformers", {"loss": 9.0, "batch": "x"}, "the batches differ from step 6 on", remedies.KEPT_APART),
        ("lightning", OTHER_STREAMS, "random numbers of torch differ from step 6", remedies.STREAMS),
        ("lightning", {"seen": 0}, "the logged seen differs from step 6", remedies.UNSTATED),
    ],
)  # fmt: skip
def test_a_frameworks_loop_is_not_told_to_register(
    loop: str, changes: dict[str, Any], says: str, finding: remedies.Finding
) -> None:
    right = history(changes)
    record = LoopRecord(loop, OBJECTS, resumes=(RESUMED,))
    found = verdict.compare(history(), verdict.History(right.lines, right.weights, {}, loop=record))
    assert says in found.text
    assert "register" not in found.text
    assert found.remedy == finding.remedy


def test_a_frameworks_other_differences_are_named() -> None:
    left, right = history(), history({"loss": 9.0})
    for line in (*left.lines.values(), *right.lines.values()):
        del line["batch"]
    trainer = LoopRecord("transformers", {}, resumes=(RESUMED,))
    found = verdict.compare(left, verdict.History(right.lines, right.weights, {}, loop=trainer))
    assert "with the same learning rate: something" in found.text, "the batches are not known"
    found = verdict.compare(left, verdict.History(left.lines, {"a": b"2"}, {}, loop=trainer))
    assert "does the Trainer save what computes them?" in found.text
    found = verdict.compare(left, verdict.History(right.lines, right.weights, {}, loop=LoopRecord("transformers", {})))
    assert found.remedy == remedies.NONDETERMINISTIC.remedy


def test_processes_that_train_on_the_same_batches_are_told_so_though_the_run_is_exact() -> None:
    found = verdict.compare(history(same_batches=True), history(same_batches=True))
    assert found.exact
    assert verdict.SAME_BATCHES in found.notes
    assert verdict.SAME_BATCHES not in verdict.compare(history(), history()).notes


def test_tensors_of_one_name_in_two_files_both_count(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    for name in ("average", "model"):
        save_file({"weight": torch.ones(1)}, final / f"{name}.safetensors")
    (final / "MANIFEST.json").write_bytes(Manifest("final", facts={}, files={}).to_json())
    found = verdict.read_history(RunPaths(tmp_path))
    assert found
    assert sorted(found.weights) == ["model.weight", "weight"]


def test_the_records_of_a_loop_are_read(tmp_path: Path) -> None:
    assert read_loop_record(RunPaths(tmp_path)) is None
    for attempt, name, fields in (
        (
            "a0001-aaaaaa",
            "0001-registered",
            {
                "loop": "steps",
                "objects": OBJECTS,
                "unsaved": ["ema.n"],
                "scheduled": ["optimizer"],
                "same_batches": True,
            },
        ),
        ("a0002-bbbbbb", "0001-restored", {"step": 5}),
        ("a0003-cccccc", "0001-restored", {"step": 0}),
    ):
        (tmp_path / "attempts" / attempt).mkdir(parents=True)
        (tmp_path / "attempts" / attempt / f"{name}.json").write_text(json.dumps(fields))
    found = read_loop_record(RunPaths(tmp_path))
    assert found == LoopRecord("steps", OBJECTS, ("ema.n",), ("optimizer",), True, (5,))
    assert (found.resume_before(6), found.resume_before(5)) == (5, None)


def test_a_rehearsal_says_what_the_way_to_train_promises() -> None:
    found = history()
    assert "run.steps: bit-identical on the same number of processes" in str(levels.promised(found))
    for line in found.lines.values():
        line["order"] = "x"
    assert "the same samples on any number" in str(levels.promised(found))
    assert levels.promised(verdict.History({}, {}, {})) is None
