"""Flag: it may be set by a signal handler, at any moment of the thread that waits for it or sets it."""

import queue
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from trainer.machine import flag
from trainer.machine.flag import Flag

MODULES = {threading.__file__, flag.__file__}


def interrupted(make: Callable[[], Any], act: Callable[[Any], object], line: int, hangs_s: float) -> str:
    """Run `act` and set the flag at its so many-th line, as a signal handler would; how that ended."""
    event, lines = make(), 0
    ends: queue.SimpleQueue[str] = queue.SimpleQueue()

    def trace(frame: FrameType, kind: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in MODULES:
            return None
        if kind == "line":
            lines += 1
            if lines == line:
                event.set()
        return trace

    def run() -> None:
        sys.settrace(trace)
        result = act(event)
        sys.settrace(None)
        ends.put("over" if lines < line else "set" if result in (True, None) and event.is_set() else "not set")

    threading.Thread(target=run, daemon=True).start()
    try:
        return ends.get(timeout=hangs_s)
    except queue.Empty:
        return "hangs"


def every_line(make: Callable[[], Any], act: Callable[[Any], object], hangs_s: float) -> set[str]:
    """How it ended, interrupted at each of its lines in turn; a waiting thread that is not woken counts as hanging."""
    ends = []
    while not ends or ends[-1] not in ("over", "hangs"):
        ends.append(interrupted(make, act, len(ends) + 1, hangs_s))
    return set(ends)


@pytest.mark.parametrize("act", [lambda event: event.wait(0.05), lambda event: event.set()], ids=["wait", "set"])
def test_a_signal_may_set_a_flag_at_any_moment(act: Callable[[Any], object]) -> None:
    assert every_line(Flag, act, 60) == {"set", "over"}


@pytest.mark.parametrize("act", [lambda event: event.wait(0.05), lambda event: event.set()], ids=["wait", "set"])
def test_a_signal_may_not_set_an_event_of_threading_at_any_moment(act: Callable[[Any], object]) -> None:
    """The fault that a flag avoids; this check finds it."""
    assert "hangs" in every_line(threading.Event, act, 2)


def test_a_flag_wakes_all_who_wait_and_stays_set() -> None:
    one, woken = Flag(), queue.SimpleQueue[bool]()
    assert not one.wait(0.01)
    for _ in range(3):
        threading.Thread(target=lambda: woken.put(one.wait(60)), daemon=True).start()
    one.set()
    assert [woken.get(timeout=30) for _ in range(3)] == [True] * 3
    assert one.is_set()
    assert one.wait(0)
