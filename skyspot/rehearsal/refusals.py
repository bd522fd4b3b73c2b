"""What a mount refused to a machine, from its trace, with the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from skyspot.rehearsal.bucketfs.manners import REMEDIES
from skyspot.rehearsal.bucketfs.trace import Call
from skyspot.rehearsal.remedies import REFUSED, Cause, Finding


@dataclass(frozen=True)
class Refusal:
    """An operation that a kind of mount does not permit."""

    what: str
    """A key of REMEDIES."""
    path: str
    mount: str
    """The kind of mount, a key of MANNERS."""
    error: int
    """The errno that the task got."""

    @property
    def text(self) -> str:
        """What happened, without a full stop."""
        where = f"a mount like {self.mount} refused an operation ({self.what}) on {self.path}"
        return f"{where}: {os.strerror(self.error)}"

    @property
    def cause(self) -> Cause:
        """The refusal as the cause of a failure."""
        return Cause(self.text, Finding(REFUSED.name, REMEDIES[self.what]))


def refusals(calls: Iterable[Call], mount: str, folder: str = "") -> list[Refusal]:
    """List the refused calls of a trace, in their order.

    Args:
        calls: The calls.
        mount: The kind of mount.
        folder: What to put before their paths.
    """
    return [Refusal(call.refused, folder + call.path, mount, call.error) for call in calls if call.refused]
