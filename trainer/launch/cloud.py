"""The cloud's notice for a script that does not watch the metadata service itself. Standard library only.

A script with SpotRun does. For any other, the launcher passes the notice on as a SIGTERM to each rank that handles it:
its handler saves. A rank without a handler would only die of it, so it trains on until the machine is taken.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.attempt.ending import NOTICE
from trainer.launch.link import Link
from trainer.launch.rank import Rank
from trainer.launch.relay import say
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.notices.named import named
from trainer.notices.notice import Notice

if TYPE_CHECKING:
    from trainer.notices.watcher import Watcher


class Cloud:
    """What the cloud announces about this machine."""

    def __init__(self, ranks: Sequence[Rank], printed: int) -> None:
        """Watch from now on, unless SKYSPOT_CLOUD is `none`; no rank may be started later, as there is a thread.

        Args:
            ranks: The ranks of this machine.
            printed: The file of printed messages: a rank that watches too says the same.
        """
        self._ranks, self._link = ranks, Link(printed=printed)
        self._notice: Notice | None = None
        self._watcher: Watcher | None = None
        if named() != "none":
            from trainer.notices.watcher import Watcher  # HTTP takes a while to load; the ranks have started by now.

            self._watcher = Watcher((), self._take_in, None, self._say_first)
            self._watcher.start()

    def pass_on(self) -> list[Rank]:
        """Return the ranks to which the notice is to be passed on now, and note in each when the machine is taken."""
        if any(rank.listens for rank in self._ranks):
            self._end()
            return []
        notice = self._notice
        if not notice:
            return []
        is_late = time.monotonic() >= notice.deadline
        waiting = [rank for rank in self._ranks if rank.code is None and rank.taken_at is None]
        found = [rank for rank in waiting if is_late or rank.handles_sigterm()]
        for rank in found:
            rank.drain()  # A rank with SpotRun reports that it listens before it handles SIGTERM.
        if any(rank.listens for rank in found):
            return []
        if found and not any(rank.taken_at for rank in self._ranks):
            left_s = max(0.0, notice.deadline - time.monotonic())
            say(f"{notice.kind}: {left_s:.0f} s left; the script gets SIGTERM")
        for rank in found:
            rank.taken_at = notice.deadline
        return found

    def takes(self, code: int) -> Notice | None:
        """Return the notice with which the ranks have ended: to leave before the machine is taken is of no use.

        Args:
            code: The exit code of all ranks.
        """
        self._end()
        watches_itself = any(rank.listens for rank in self._ranks)
        return self._notice if code == EXIT_PREEMPTED and not watches_itself else None

    def _end(self) -> None:
        if self._watcher:
            self._watcher.end(wait_s=0.0)

    def _take_in(self, notice: Notice) -> None:
        self._notice = notice

    def _say_first(self, line: str) -> None:
        if self._link.is_first_to_print(line):
            say(line)


def hold_s(notice: Notice) -> float:
    """The longest time to wait until the machine is taken, in seconds."""
    return NOTICE.hold_s(notice.deadline)
