"""Scenarios run side by side from the start of the session; each test waits for the one that it judges.

@scenario
def killed_twice(lab):              what is done, in a thread of its own
    ...
    return what the test looks at

def test_it_resumes(killed_twice):  waits for it; what it raised is raised here
    assert ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import pytest
from lab import Lab

# A launch takes a core for half a minute: more at once only wait for each other.
SIDE_BY_SIDE = 5
_all: dict[str, Callable[[Lab], Any]] = {}


def scenario(function: Callable[[Lab], Any]) -> Any:
    """Make a function a scenario, and a fixture of its name."""
    name = function.__name__
    _all[name] = function

    @pytest.fixture(scope="session", name=name)
    def ended(side_by_side: dict[str, Future[Any]]) -> Any:
        return side_by_side[name].result()

    return ended


def start(lab: Lab, names: Iterable[str]) -> dict[str, Future[Any]]:
    """Start those of the named that are scenarios, in the order in which they are written."""
    room = threading.Semaphore(SIDE_BY_SIDE)
    wanted = set(names)
    futures: dict[str, Future[Any]] = {name: Future() for name in _all if name in wanted}

    def run(name: str) -> None:
        with room:
            try:
                lab.note(f"{name} begins")
                result = _all[name](lab)
            except BaseException as error:
                lab.note(f"{name} failed: {(str(error).splitlines() or [type(error).__name__])[0]}")
                futures[name].set_exception(error)
            else:
                futures[name].set_result(result)

    for name in futures:
        threading.Thread(target=run, args=(name,), name=name, daemon=True).start()
    return futures
