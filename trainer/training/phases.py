"""Phases: the loaders that a run uses, one after the other, and which of them a checkpoint was saved in.

A program may call `steps` several times. A call with the loader of the call before goes on in its order; a call with
another loader begins that loader from its start. A resumed attempt makes the same calls again, or begins with the call
that the checkpoint is in, or with the one after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from trainer.training.feed import Feed
from trainer.training.registered import Registered


class Phases:
    """The calls of `steps` in this attempt."""

    def __init__(self, contents: Registered) -> None:
        self._contents = contents
        self._loader: object = None
        self.number = -1
        """The number of the loader among those of the run, from 0."""
        self._opened: tuple[Feed, Iterator[Any]] | None = None

    def begin(self, loader: Iterable[Any], until: int) -> bool:
        """Take the loader of a call; False if the run is past what the call asks for."""
        data, done = self._contents.data, self._contents.done
        if loader is not self._loader:
            self._loader, self._opened = loader, None
            self.number += 1
        if data.first_until is None:
            data.first_until = until
        is_first_again = until == data.first_until  # Of a program that makes the calls of earlier attempts again.
        if done >= until:
            if until == data.until and not is_first_again:
                self.number = max(self.number, data.loader)  # The attempt began with this call.
            return False
        if self._opened is None and self.number < data.loader:
            if until == data.until:
                self.number = data.loader  # The attempt began with this call.
            elif done == data.until and not is_first_again:
                self.number = data.loader + 1  # The attempt began with the call after the one that has ended.
            else:
                return False  # The program left that call with `break`.
        if self.number > data.loader:
            data.begin_loader(self.number)
        data.until = until
        return True

    def open(self, make: Callable[[], Feed]) -> tuple[Feed, Iterator[Any]]:
        """The feed of the loader, and its batches: those that an earlier call has left, or new ones."""
        if self._opened is None:
            feed = make()
            self._opened = feed, feed.epochs()
        return self._opened

    def close(self) -> None:
        """Let go of the loader; its worker processes end."""
        self._opened = None
