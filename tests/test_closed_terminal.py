"""SIGHUP to a script that is started without our launcher: its terminal is closed, and nohup has it go on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from in_process import Attempts
from support import clean_env, event
from torch.utils.data import DataLoader

from trainer import SpotRun


@pytest.fixture(autouse=True)
def heed_sighup() -> Iterator[None]:
    """The tests may themselves run under nohup, and children inherit what is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def script(run: SpotRun, _: Callable[[], None]) -> None:
    """A loop that gets a SIGHUP in its third step."""
    model = torch.nn.Linear(1, 1)
    run.register(model=model)
    for batch in run.steps(DataLoader(torch.randn(9, 1)), until=6):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        model(batch)
    run.finish()


def test_sighup_saves_and_leaves_as_sigterm_does(tmp_path: Path) -> None:
    assert Attempts(tmp_path / "run").one(script, save_every=100) == 75
    ended: Any = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["committed_step"], ended["notice"]["kind"]) == ("signal", 3, "sighup")
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL, "after the run it is the program's again"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None], ids=["nohup", "of the script's own"])
def test_sighup_stays_what_the_program_has_made_of_it(tmp_path: Path, handler: Any) -> None:
    signal.signal(signal.SIGHUP, handler)
    assert Attempts(tmp_path / "run").one(script, save_every=100) == 0
    assert signal.getsignal(signal.SIGHUP) is handler


IN_TERMINAL = """
import fcntl, sys, termios
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from trainer import SpotRun

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with SpotRun(sys.argv[1], save_every=100) as run:
    model = torch.nn.Linear(1, 1)
    run.register(model=model)
    for batch in run.steps(DataLoader(torch.randn(9, 1)), until=6):
        model(batch)
        if run.step == 2:
            Path(sys.argv[1] + "-ready").touch()
            assert run.notices.received.wait(60)
        print("a line of the script's own", flush=True)
    run.finish()
"""


def test_a_script_in_a_terminal_that_is_closed_saves_though_it_prints(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(IN_TERMINAL)
    ours, its = os.openpty()
    with warm.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run")],
        env=clean_env(OMP_NUM_THREADS="1"), stdin=its, stdout=its, stderr=its, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(its)
        end = time.monotonic() + 60
        while not (tmp_path / "run-ready").exists():
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        os.close(ours)
        assert process.wait(60) == 75
    ended: Any = event(tmp_path / "run", "end")
    assert (ended["cause"], ended["committed_step"], ended["notice"]["kind"]) == ("signal", 3, "sighup")
