"""Rules of the layout by which the trainer holds a limit and the report counts: one of each, in trainer/layout."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.layout.accelerators import OTHER_NAME, OTHER_NUMBER, UNNAMED, likeness
from trainer.layout.events import number
from trainer.layout.lifetime import lead_s
from trainer.layout.names import run_name

START = {"machine": "m", "time": 1000.0, "setup_s": 60, "since_setup_s": 10.0, "launched_s": 2.0}


@pytest.mark.parametrize(
    ("changes", "earlier", "seconds"),
    [
        ({}, [], 70.0),
        ({"setup_s": None}, [], 2.0),
        ({"setup_s": None, "launched_s": None}, [], 0.0),
        ({"since_setup_s": 302.0}, [], 362.0),
        ({"since_setup_s": 303.0}, [], 2.0),  # Too long before the launcher: another job's.
        ({}, [{"machine": "m", "time": 991.0}], 2.0),  # After the set-up, so that counts there.
        ({}, [{"machine": "m", "time": 989.0}], 70.0),
        ({}, [{"machine": "other", "time": 991.0}], 70.0),
        ({"machine": None}, [{"time": 991.0}], 70.0),  # Nothing says that it is the same machine.
        ({"since_setup_s": None}, [], 62.0),  # Of an older release.
        ({"since_setup_s": None}, [{"machine": "m", "time": 1.0}], 2.0),
        ({"setup_s": "x", "launched_s": True}, [], 0.0),
    ],
)
def test_the_lead_is_the_set_up_of_the_first_attempt_after_it_else_the_launchers(
    changes: dict[str, Any], earlier: list[dict[str, Any]], seconds: float
) -> None:
    assert lead_s({**START, **changes}, earlier) == seconds


@pytest.mark.parametrize(
    ("machine", "driver", "per_node", "expected"),
    [
        ("A100:8", "NVIDIA A100-SXM4-80GB", 8, 1), ("A100-80GB:8", "NVIDIA A100-SXM4-80GB", 8, 2),
        ("A100-80GB:8", "NVIDIA A100-SXM4-40GB", 8, OTHER_NAME), ("L4:1", "NVIDIA L40S", 1, OTHER_NAME),
        ("L40S:1", "NVIDIA L40S", 1, 1), ("RTX4090:1", "NVIDIA GeForce RTX 4090", 1, 1),
        ("A100:8.0", "NVIDIA A100-SXM4-40GB", 8, 1), ("A100:8", "NVIDIA A100-SXM4-40GB", 4, OTHER_NUMBER),
        ("A100:8", "NVIDIA A100-SXM4-40GB", None, 1), ("A100:8", "", 8, UNNAMED), ("A100:8", "", 4, OTHER_NUMBER),
        ("p4d.24xlarge", "NVIDIA A100-SXM4-40GB", 8, UNNAMED), ("CPU", "", None, UNNAMED),
        ("A100:many", "NVIDIA A100-SXM4-40GB", 8, OTHER_NUMBER),
    ],
)  # fmt: skip
def test_an_accelerator_is_the_rung_whose_name_is_in_the_drivers_words(
    machine: str, driver: str, per_node: int | None, expected: int
) -> None:
    assert likeness(machine, driver, per_node) == expected


@pytest.mark.parametrize(
    ("launch", "name"),
    [
        ("sky-managed-2026-11-30-08-00-00-000000_run-001_7-0", "run-001"),
        ("sky-managed-2026-11-30-08-00-00-000000_a_b_7-0", "a_b"),
        ("sky-managed-rehearsal-preempted-a1b2c3_run-001_1-0", ""), ("local-12ab34cd", ""), ("", ""),
    ],
)  # fmt: skip
def test_a_runs_name_is_read_from_skypilots_id_of_the_task(launch: str, name: str) -> None:
    assert run_name(launch) == name


@pytest.mark.parametrize("value", [None, True, "1", -1, 1e10, 10**400, math.nan, math.inf, [], {}])
def test_what_is_no_number_of_a_record_is_none(value: object) -> None:
    assert number({"a": value}, "a") is None
