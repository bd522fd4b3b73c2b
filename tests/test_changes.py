"""Facts that differ between the attempt that saved a checkpoint and the one that resumes: each is reported."""

from pathlib import Path
from typing import Any

import one_rank
import pytest
from support import event

from trainer.layout.manifest import read_manifest
from trainer.layout.names import RunPaths, list_checkpoints
from trainer.training.changes import changes, sentence

THEN: dict[str, Any] = {
    "world_size": 2,
    "config": {"precision": "fp32", "micro_batch_size": 4, "max_grad_norm": 1.0, "deterministic": False, "seed": 0},
    "machine": {"device": "A100", "instruction_set": "AVX2", "torch": "2.12", "threads": 8, "host": "a"},
}
FACTS = [
    ("world_size", 4, "processes 2 -> 4"),
    ("config.precision", "bf16", "precision fp32 -> bf16"),
    ("config.micro_batch_size", 2, "micro-batch size 4 -> 2"),
    ("config.max_grad_norm", 0.1, "maximum gradient norm 1.0 -> 0.1"),
    ("config.deterministic", True, "deterministic algorithms False -> True"),
    ("machine.device", "H100", "device A100 -> H100"),
    ("machine.instruction_set", "AVX512", "instruction set AVX2 -> AVX512"),
    ("machine.torch", "2.13", "torch 2.12 -> 2.13"),
    ("machine.threads", 4, "threads 8 -> 4"),
]


def changed(where: str, value: object) -> dict[str, Any]:
    """The facts with another value in one place."""
    part, _, key = where.rpartition(".")
    return {**THEN, part: {**THEN[part], key: value}} if part else {**THEN, key: value}


@pytest.mark.parametrize(("where", "value", "said"), FACTS)
def test_each_fact_that_may_change_the_bits_is_reported(where: str, value: object, said: str) -> None:
    found = changes(THEN, changed(where, value))
    assert len(found) == 1
    assert sentence(7, found) == (
        f"Changed since step 7: {said}. From here on, results may not be bit-identical to an undisturbed run's."
    )


@pytest.mark.parametrize("where", ["config.seed", "machine.host"])
def test_a_fact_that_changes_no_bits_is_not_reported(where: str) -> None:
    assert changes(THEN, changed(where, "another")) == {}


@pytest.mark.parametrize("then", [{}, {"config": None, "machine": []}, {"config": {}, "machine": {}}])
def test_a_fact_that_an_older_release_did_not_record_has_not_changed(then: dict[str, Any]) -> None:
    assert changes(then, THEN) == {}


def test_a_manifest_holds_every_fact_and_a_resume_prints_those_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script's own training: nothing binds these settings."""
    run_dir = tmp_path / "run"
    assert one_rank.train(run_dir, max_steps=2).code == 0
    [name] = list_checkpoints(RunPaths(run_dir))
    facts = read_manifest(RunPaths(run_dir).checkpoint(name)).facts
    for where, *_ in FACTS:
        part, _, key = where.rpartition(".")
        assert key in (facts[part] if part else facts), where
    capsys.readouterr()
    settings = {"max_steps": 4, "allow_config_change": ("max_steps",), "micro_batch_size": 1, "max_grad_norm": 0.1}
    assert one_rank.train(run_dir, **settings).code == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "Changed since" in line]
    assert "step 2: micro-batch size 2 -> 1, maximum gradient norm 1.0 -> 0.1. From" in line
    recorded = event(run_dir, "restored")["changed"]
    assert recorded == {"micro-batch size": [2, 1], "maximum gradient norm": [1.0, 0.1]}
