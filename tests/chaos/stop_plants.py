"""Mistakes about stops, to plant in an attempt; the campaign of stops must find each (`tests/chaos/stops.py --plants`).

The functions are called in the attempt's process. They import what they change, because a program in the phase "import"
has not loaded torch. They change it by its name: `changed` fails where there is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LIMIT_S = 5.0
"""How long a program with a mistake waits to hear of its stop."""
PEER_TIMEOUT_S = 3.0
"""How long its ranks wait for each other."""
LEFT_BEHIND_S = 300.0
Change = Callable[..., Any]
"""Makes what stands in place of a function; gets that function first."""


def changed(owner: Any, name: str, change: Change) -> None:
    """Put a mistake in place of a function; the change gets the function, and what it is called with."""
    right = getattr(owner, name)
    assert callable(right), f"{owner.__name__}.{name} is no function: nothing would be planted"
    setattr(owner, name, lambda *given, **named: change(right, *given, **named))


def nothing_is_saved(_options: argparse.Namespace) -> None:
    """A stop does not save."""
    from trainer.training.session import Session

    changed(Session, "save_last", lambda save, session, stop, resave=False: None)


def saved_in_the_handler(_options: argparse.Namespace) -> None:
    """The signal handler saves and leaves, wherever the program is."""
    from trainer.attempt.ending import SIGNAL
    from trainer.notices.received import Notices
    from trainer.training.session import Session

    begun: list[Any] = []

    def begin(right: Change, session: Any) -> None:
        begun.append(session)
        right(session)

    def on_signal(right: Change, *given: Any) -> None:
        right(*given)
        begun[0].save_last(None)
        begun[0]._host.leave(SIGNAL)

    changed(Session, "begin", begin)
    changed(Notices, "_on_signal", on_signal)


def not_agreed(_options: argparse.Namespace) -> None:
    """Each rank stops for its own notice alone."""
    from trainer.training.consensus import Consensus

    def take_in(right: Change, consensus: Any, rows: Any, *given: Any) -> None:
        right(consensus, [rows[consensus._host.group.rank]] * len(rows), *given)

    changed(Consensus, "take_in", take_in)


def exit_0(_options: argparse.Namespace) -> None:
    """A stop ends with 0, as a finished run does."""
    from trainer import SpotRun

    changed(SpotRun, "leave", lambda leave, run, ending, **more: leave(run, ending, **{**more, "code": 0}))


def looked_at_between_saves(options: argparse.Namespace) -> None:
    """A notice is looked at only at a boundary that is saved."""
    from trainer.training.participant import Participant

    options.save_every = every = 20

    def own_stop(right: Change, run: Any) -> Any:
        return right(run) if run.steps_done and run.steps_done % every == 0 else None

    changed(Participant, "own_stop", own_stop)


def polled_in_training(_options: argparse.Namespace) -> None:
    """The training thread asks the metadata service."""
    from trainer.notices.here import source_of
    from trainer.notices.named import named
    from trainer.training.participant import Participant

    source: Any = source_of(named())

    def own_stop(right: Change, run: Any) -> Any:
        source.ask()
        return right(run)

    changed(Participant, "own_stop", own_stop)


def token_not_sent(_options: argparse.Namespace) -> None:
    """AWS's service is asked without a token."""
    from trainer.notices.aws import Aws

    changed(Aws, "_get", lambda get, source, path: source._service.ask(f"/latest/meta-data/{path}"))


def not_held(_options: argparse.Namespace) -> None:
    """An attempt leaves once it has saved, while its machine is still there."""
    from trainer.training.participant import Participant

    changed(Participant, "hold", lambda hold, run, seconds, ending, **end: run.write_end(ending, **end))


def left_at_once(_options: argparse.Namespace) -> None:
    """An attempt that says that it holds leaves at once."""
    from trainer.training.participant import Participant

    changed(Participant, "hold", lambda hold, run, seconds, ending, **end: hold(run, 0.0, ending, **end))


def deadline_not_agreed(_options: argparse.Namespace) -> None:
    """Each rank stops by its own deadline; one without a notice of its own has the grace."""
    from trainer.training.consensus import Consensus

    def take_in(right: Change, consensus: Any, *given: Any) -> None:
        had, host = consensus.stop, consensus._host
        right(consensus, *given)
        if consensus.stop and not had:
            own = host.own_stop()
            deadline = own.deadline if own else time.monotonic() + host.grace_s
            consensus.stop = dataclasses.replace(consensus.stop, deadline=deadline)

    changed(Consensus, "take_in", take_in)


def freeze_taken_for_preempt(_options: argparse.Namespace) -> None:
    """Every event of Azure's takes the machine."""
    from trainer.notices import azure

    changed(azure, "_announced", lambda right, *given: dataclasses.replace(right(*given), takes_machine=True))


def false_taken_for_true(_options: argparse.Namespace) -> None:
    """Google Cloud's FALSE is a text, and so it is true."""
    from trainer.notices.gcp import Gcp

    changed(Gcp, "_value", lambda right, source, answer: bool(answer.text))


def process_left(_options: argparse.Namespace) -> None:
    """A process outlives the attempt."""
    if os.fork() == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 2)
        os.closerange(3, 256)
        time.sleep(LEFT_BEHIND_S)
        os._exit(0)


@dataclass(frozen=True)
class Plant:
    """A mistake, and the stop that finds it."""

    make: Callable[[argparse.Namespace], None]
    """Plants it; gets the program's options."""
    seen: str
    """How the campaign names what is wrong."""
    stop: dict[str, Any] = field(default_factory=dict)
    """What is other than in a SIGTERM to the launcher, in an ordinary step of one rank."""


TO_ONE_OF_TWO = {"ranks": 2, "at_rank": 1, "word": "SIGTERM to one rank"}
AWS, GCP, AZURE = ({"word": f"{cloud}'s notice"} for cloud in ("AWS", "Google Cloud", "Azure"))
PLANTS = {
    "nothing is saved": Plant(nothing_is_saved, "3 steps were lost"),
    "saving in the signal handler": Plant(
        saved_in_the_handler, "the checkpoint of step 1 holds the optimizer's step 2", {"phase": "the optimizer's step"}
    ),
    "stopping at different steps": Plant(
        not_agreed, "the ranks stopped at different steps: rank 0 at none, rank 1 at 3", TO_ONE_OF_TWO
    ),
    "exit 0": Plant(exit_0, "it ended with 0, not 75"),
    "a notice only looked at between saves": Plant(
        looked_at_between_saves, "more steps after it had heard of the stop"
    ),
    "a poll on the training thread": Plant(polled_in_training, "the training thread asked the metadata service", AWS),
    "token not sent": Plant(
        token_not_sent, "the metadata service refused GET /latest/meta-data/spot/instance-action: 401", AWS
    ),
    "hold missing": Plant(not_held, "it did not hold until its machine was taken", AWS),
    "hold left at once": Plant(left_at_once, "it did not hold until its machine was taken", AWS),
    "a deadline that is not agreed": Plant(
        deadline_not_agreed, "the ranks have different deadlines: ",
        {**AWS, "ranks": 2, "notice_s": 10.0},
    ),
    "Azure's Freeze taken for Preempt": Plant(
        freeze_taken_for_preempt, "it was never in its phase; it ended with 75, for azure/Freeze-0", AZURE
    ),
    "Google Cloud's FALSE taken for TRUE": Plant(
        false_taken_for_true, "it was never in its phase; it ended with 75, for gcp/preempted/", GCP
    ),
    "a process is left": Plant(process_left, "processes are left: process "),
}  # fmt: skip
