"""What fits before a stop's deadline: the rest of a step, a save, or the save that is under way."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import one_rank
import pytest
import torch
from clock import Clock
from support import event
from torch import nn

from trainer.checkpoint import writing
from trainer.notices.notice import Notice
from trainer.ranks.agreement import Stop
from trainer.training.consensus import Consensus
from trainer.training.fit import Fit


def test_the_rest_of_a_step_is_finished_where_it_and_a_save_fit() -> None:
    assert Fit(left_s=20, rounds_left=3, round_s=3, save_s=7).fits
    assert not Fit(left_s=20, rounds_left=3, round_s=3, save_s=8).fits, "a save may take half as long again"
    assert not Fit(left_s=20, rounds_left=4, round_s=3, save_s=6).fits
    assert Fit(left_s=20, rounds_left=3, round_s=3, save_s=0).fits
    assert not Fit(left_s=20, rounds_left=4, round_s=3, save_s=0).fits, "half is kept for a save of unknown length"
    assert not Fit(left_s=20, rounds_left=1, round_s=0, save_s=1).fits, "no speed is known"


# -- several ranks -----------------------------------------------------------------------------------------------------


def rank(number: int, stop: Stop, save_s: float) -> Any:
    group = SimpleNamespace(rank=number)
    host = SimpleNamespace(group=group, own_stop=lambda: stop, hinted=threading.Event(), stopping=None)
    saver = SimpleNamespace(save_s=save_s, hurry=lambda deadline: None)
    return Consensus(host, saver, SimpleNamespace(steps=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("noticed", [0, 1])
def test_ranks_with_other_clocks_notices_and_speeds_draw_the_same_conclusions(clock: Clock, noticed: int) -> None:
    """The least time left counts, and rank 0's measured times."""
    now = time.monotonic()
    stops = [Stop("sigterm", now + 60, now - 1)] * 2
    stops[noticed] = Stop("sigterm", now + 20, now - 5)
    ranks = [rank(number, stops[number], save_s=1 + 50 * number) for number in range(2)]
    for _ in range(2):
        rows = [one.message() for one in ranks]
        begun = time.monotonic()
        for one in ranks:
            clock.added += 2  # Rank 1 measures another time than rank 0.
            one.take_in(rows, begun)
    assert ranks[0].stop.kind == ranks[1].stop.kind == "sigterm"
    for one in ranks:
        assert one.stop.deadline == pytest.approx(now + 20, abs=0.1), "however long the round took"
        assert one.stop.heard_at == pytest.approx(now - 5, abs=0.1)
    for rounds_left in range(10):
        assert ranks[0].fit(rounds_left) == ranks[1].fit(rounds_left)
    fit = ranks[0].fit(3)
    # The second message was sent after 4 s, and a micro-step of 2 s has passed since.
    assert (fit.left_s, fit.rest_s, fit.save_s) == (pytest.approx(14, abs=0.1), pytest.approx(6, abs=0.1), 1)


# -- one step of 60 s, and a notice of 30 s ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigterm", "gcp-notice"])
@pytest.mark.parametrize(
    ("noticed_in", "saved", "decision"),
    [
        (0, 1, "dropping the micro-steps of step 2"),
        (10, 1, "dropping the micro-steps of step 2"),  # It would fit if the time left were not a micro-step old.
        (15, 2, "finishing step 2 first"),
        (19, 2, "dropping the micro-steps of step 3"),  # In the last micro-step: the ranks agree in the next one.
    ],
)
def test_a_step_of_60_s_in_20_micro_steps_and_a_notice_of_30_s(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], kind: str, noticed_in: int, saved: int,
    decision: str,
) -> None:  # fmt: skip
    """Nothing is saved before; a micro-step adds 3 s to the clock."""
    runs: list[one_rank.InProcess] = []
    passes: list[float] = []
    deadline: list[float] = []

    def begun(run: one_rank.InProcess) -> None:
        runs.append(run)
        print_line = run.print_line

        def printed(text: str) -> None:
            print_line(text)
            if text == "holding until this machine is taken":
                run.notices.signalled.set()  # It is.

        run.print_line = printed  # type: ignore[method-assign]

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 1:
            if len(passes) == noticed_in:
                if kind == "sigterm":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    runs[0].notices._take_in(Notice(kind, "gcp/preempted", time.monotonic(), 30))
                assert runs[0].notices.received.wait(60)
                deadline.append(time.monotonic() + 30)
            passes.append(time.monotonic())
        clock.added += 3
        return one_rank.squares(model, batch)

    sizes = {"global_batch_size": 20, "micro_batch_size": 1, "max_steps": 4, "save_interval_steps": 100}
    ended = one_rank.train(tmp_path / "run", loss=loss, before=begun, grace_s=30, **sizes)
    assert time.monotonic() < deadline[0]
    cause = "signal" if kind == "sigterm" else "notice"
    assert (ended.code, event(tmp_path / "run", "end")["cause"]) == (75, cause)
    assert event(tmp_path / "run", "end")["committed_step"] == event(tmp_path / "run", "end")["step"] == saved
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{kind}: ")]
    assert said[-1].endswith(f"a save takes an unknown time; saving step {saved}")
    assert [line.rpartition(": ")[2] for line in said[:-1]] == [decision], said
    assert re.fullmatch(rf"{kind}: \d+\.\d s left; the rest of the step takes \d+\.\d s, a save an .*", said[0]), said


# -- a save under way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after", "committed"), [(0, 0, 3), (35, 35, 3), (10, 70, 2)])
def test_a_stop_leans_on_the_save_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, before: float, after: float, committed: int
) -> None:
    """Where no time is left for one more, the boundary that is being saved is the one that counts.

    Where some is left, one more is tried, although the save under way took longer than that.

    Args:
        before: Seconds that the save under way has taken when the stop comes, 60 s before the deadline.
        after: Seconds that it takes from then on.
        committed: The step that is committed in the end.
    """
    runs: list[one_rank.InProcess] = []
    under_way, heard = threading.Event(), threading.Event()
    said: list[str] = []

    def begun(run: one_rank.InProcess) -> None:
        runs.append(run)
        monkeypatch.setattr(run, "print_line", printed)

    def printed(text: str) -> None:
        said.append(text)
        if "waiting for the save of step 2" in text:
            clock.added += after
            heard.set()
            assert any(runs[0].last_committed() == 2 or time.sleep(0.01) for _ in range(6000)), said

    def at_point(point: str) -> None:
        if point == "folder-made" and not under_way.is_set():
            under_way.set()
            assert heard.wait(60), said

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 2 and not runs[0].notices.received.is_set():
            assert under_way.wait(60)
            clock.added += before
            os.kill(os.getpid(), signal.SIGTERM)
            assert runs[0].notices.received.wait(60)
        return one_rank.squares(model, batch)

    monkeypatch.setattr(writing, "at_point", at_point)
    assert one_rank.train(tmp_path / "run", loss=loss, before=begun, grace_s=60).code == 75
    assert any("waiting for the save of step 2, then saving step 3" in line for line in said), said
    assert (event(tmp_path / "run", "end")["step"], event(tmp_path / "run", "end")["committed_step"]) == (3, committed)
    late = "Step 3 was not committed in time. The last committed step is 2."
    assert (late in said) == (committed == 2), said
