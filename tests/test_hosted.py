"""A notebook's or pytest's process: it outlives the attempts in it. These run in pytest's own process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import clean_env, event, losses

from trainer import SpotRun
from trainer.training import unwinding

THREADS = {"bucket", "records", "heartbeat", "leaving", "notices", "launcher", "crashes", "save"}


@pytest.fixture(autouse=True)
def _process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever an attempt does, the process has its threads, signal handlers and life afterwards."""
    for name in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(name)
    known = set(threading.enumerate())
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for thread in set(threading.enumerate()) - known:
        if thread.name in THREADS:
            thread.join(30)
            assert not thread.is_alive(), thread.name
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def cell(folder: Path, interrupted_at: int = 0, fails_at: int = 0) -> int:
    """Train as in a notebook's cell."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SpotRun(folder, save_every=2) as run:
        run.register(model=model, optimizer=optimizer)
        for batch in run.steps([torch.ones(2, 3)] * 4, until=6):
            if run.step + 1 == interrupted_at:
                signal.raise_signal(signal.SIGINT)
            if run.step + 1 == fails_at:
                raise ValueError("a mistake in the cell")
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss)
        run.finish()
    return run.step


def test_a_cell_is_interrupted_and_fails_and_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as interrupted:
        cell(tmp_path / "run", interrupted_at=3)
    assert interrupted.value.code == 75
    assert event(tmp_path / "run", "end")["committed_step"] == 3, "no step is lost"
    with pytest.raises(SystemExit) as failed:
        cell(tmp_path / "run", fails_at=5)
    assert failed.value.code == 1
    assert "ValueError: a mistake in the cell" in capsys.readouterr().err
    assert cell(tmp_path / "run") == 6
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    assert cell(tmp_path / "run") == 6, "already finished"


def test_a_script_is_not_hosted_whatever_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unwinding.hosted(), "pytest"
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    assert unwinding.hosted(), "a notebook or an interactive Python"
    monkeypatch.setenv("SKYSPOT_LINK", "3,4,5")
    assert not unwinding.hosted(), "a rank"
    monkeypatch.delenv("SKYSPOT_LINK")
    script = types.ModuleType("__main__")
    script.__file__ = "/home/me/train.py"
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert not unwinding.hosted()
