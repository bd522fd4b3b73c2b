"""Managed: what a CheckpointManager does on each rank: it loads, saves when it is time, and ends the attempt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

from torch import nn

from trainer.attempt.ending import ERROR, FINISHED
from trainer.checkpoint import extras
from trainer.errors import RunError, one_line
from trainer.launch.link import Link
from trainer.ranks.group import destroy_groups
from trainer.training import rng
from trainer.training.closing import Closing
from trainer.training.joining import join, open_session
from trainer.training.participant import END_THREADS_S
from trainer.training.registered import Registered
from trainer.training.run import SpotRun

FLUSH_S = 2.0


class Managed:
    """One attempt of a program that saves by itself. Every rank calls the same methods in one order."""

    def __init__(self, run: SpotRun, save_every: int) -> None:
        """Join the other ranks.

        Args:
            run: The attempt.
            save_every: Steps between checkpoints.
        """
        self._run, self._save_every, config = run, save_every, run.config
        join(run)
        run.group.rank0_does("bind", lambda: run.bind(), run.check_stop)
        self._contents = Registered(config.on_nan != "ignore", config.to_json())
        self._contents.state = run.state
        self._session = open_session(run, self._contents, save_every)
        self._closing = Closing(run, self._session, self._contents, lambda: None, lambda name: None)
        self._objects: dict[str, Any] = {}
        self._is_leaving = False

    def load(self, objects: Mapping[str, Any]) -> int:
        """Load the newest whole checkpoint into the objects; returns the steps that are done.

        Raises:
            RunError: an object cannot be saved.
            StateError: the checkpoint does not fit.
        """
        for line in self._contents.add(objects, "load_latest", "manager.state"):
            self._run.print_line(line)
        extras.refuse_other_names(self._run.group, objects, self._run.check_stop)
        self._run.check_stop()
        self._session.load()
        self._contents.refuse_missing()
        self._session.begin()
        data = self._contents.data
        if (streams := data.streams_at_restore) is not None:
            data.streams_at_restore = None
            rng.load_streams(streams)
        self._objects = dict(objects)
        return self._contents.done

    def save(self, step: int, objects: Mapping[str, Any]) -> bool:
        """Save the objects, if it is time; returns whether the newest checkpoint is that of this step.

        Raises:
            RunError: the objects or the step make no sense.
            SaveError: the attempt cannot go on.
        """
        run, contents, session = self._run, self._contents, self._session
        self._refuse_others(objects)
        if type(step) is not int or step < max(1, contents.done):
            raise RunError(f"save(step={step!r:.40}): give the steps done in the whole run: {contents.done} so far")
        run.steps_done = step
        if run.journal:
            run.journal.line({"step": step, "world_size": run.world_size})
            run.journal.progress({"step": step, "committed_step": session.saver.committed_step})
        is_due = step // self._save_every > session.saved_at // self._save_every
        if self.is_interrupted():
            contents.done = step
            session.save_last(session.stop)
        elif is_due or session.consensus.save_now:
            contents.done = step
            session.save()
            session.saver.wait()
        return session.saver.committed_step == step

    def _refuse_others(self, objects: Mapping[str, Any]) -> None:
        for name in sorted(objects.keys() ^ self._objects.keys()):
            raise RunError(
                f"save({name}=...): load_latest() did not get it. Give the same objects to both; put plain values into "
                "manager.state"
                if name in objects
                else f"save(): {name}, which load_latest() got, is missing. Give the same objects to both"
            )
        for name, thing in objects.items():
            if _identity(thing) != _identity(self._objects[name]):
                raise RunError(f"save({name}=...): this is another object than the one that load_latest() got")

    def is_interrupted(self) -> bool:
        """True if the attempt has to end; the same on every rank.

        Raises:
            Leaving: a newer attempt has begun: nothing may be saved.
        """
        session = self._session
        if session.stop is None:
            session.take_in(self._run.group.exchange(session.message()).wait())
        if session.stop and not session.stop.ending.saves:
            self._closing.stop(session.stop)
        return session.stop is not None

    def leave(self) -> NoReturn:
        """Leave after an interruption."""
        assert self._session.stop
        self._is_leaving = True
        self._closing.stop(self._session.stop)

    def end(self) -> None:
        """End the attempt where the program has ended by itself; called as the process exits.

        Raises:
            SystemExit: it was interrupted, and the process leaves with that code.
        """
        run = self._run
        if self._is_leaving or run._exit is not None:
            return
        if self._session.stop:
            try:
                self.leave()
            except BaseException as leaving:
                run.__exit__(type(leaving), leaving, leaving.__traceback__)
        error = getattr(sys, "last_value", None)  # Of the exception that ended the script.
        if isinstance(error, BaseException):
            run._report_crash(one_line(error))
        else:
            self._session.saver.settle(at_end=True)  # No later attempt prunes what this one leaves.
        with suppress(Exception):
            if run.journal:
                run.journal.flush(FLUSH_S)
        if Link.from_env().is_connected:
            run.attempt = None  # The launcher records the end: it learns the exit code.
        ending = FINISHED if error is None else ERROR
        run.part(ending, ending.code)
        destroy_groups(END_THREADS_S)


def _identity(thing: Any) -> object:
    """The same for an object and for wrappers around it."""
    if isinstance(thing, nn.Module):
        return frozenset(map(id, thing.parameters())) or id(thing)
    return id(thing)
