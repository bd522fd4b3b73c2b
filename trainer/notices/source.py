"""What a source of notices is: one small module for each cloud has one. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Announcement:
    """What a cloud announces about this machine."""

    id: str
    """Identifies it, on this machine and on any other; begins with the cloud's name."""
    about: str
    """What is announced, as the cloud puts it, for a line about it."""
    seconds_left: float
    """Until the machine is taken; negative: that time has passed."""
    takes_machine: bool = True
    """False for an event that does not take the machine for good: it is said once, and changes nothing."""
    is_hint: bool = False
    """The machine may be taken later: one more checkpoint is saved now, and training goes on."""


class Source(Protocol):
    """A cloud's word, asked by one thread in a loop."""

    cloud: str
    """As SkyPilot writes it, in small letters."""
    poll_s: float
    """Seconds between two requests."""
    longest_s: float
    """The longest notice that this cloud gives, in seconds: a time beyond it is not believed."""

    def ask(self) -> Sequence[Announcement]:
        """Return what is announced now; may wait for a change.

        Raises:
            Exception: the service does not answer, or with something else. It is asked again.
        """
        ...

    def close(self) -> None:
        """End a request under way; called from another thread."""
        ...
