"""Orders the tests so that no long one is left for the end, when other workers would have nothing to do.

`pytest.mark.slow(SECONDS)` says how long a test takes; without SECONDS, a slow test counts as UNSAID_S. pytest-xdist
gives each worker an equal part of the list, in order; later, a worker with nothing left to do takes over the end of
another's part. So the slow tests are dealt out to the workers, the longest first, and stand at the head of each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest

UNSAID_S = 10.0
Test = TypeVar("Test")


def seconds(item: pytest.Item) -> float:
    """How long a test takes, as its mark says; 0 if it is not slow."""
    mark = item.get_closest_marker("slow")
    return 0.0 if mark is None else float(mark.args[0]) if mark.args else UNSAID_S


def dealt(slow: Sequence[Test], others: Sequence[Test], workers: int) -> list[Test]:
    """All tests in the order of the workers' parts; `slow` has the longest first."""
    found, rest, count = list[Test](), list(others), len(slow) + len(others)
    for number in range(workers):
        mine = slow[number::workers]
        room = (count - len(found)) // (workers - number) - len(mine)
        found += [*mine, *rest[: max(0, room)]]
        del rest[: max(0, room)]
    return [*found, *rest]


@pytest.hookimpl(trylast=True)  # After -m and -k have chosen.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = sorted((item for item in items if seconds(item)), key=seconds, reverse=True)
    items[:] = dealt(slow, [item for item in items if not seconds(item)], workers) if workers > 1 else items
