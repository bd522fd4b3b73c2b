"""When the first machine is taken, where a cloud has said so only after a signal stopped the run."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from trainer.notices.notice import Notice
from trainer.ranks.messages import TAKEN_IN

if TYPE_CHECKING:
    from trainer.ranks.group import RankGroup


class TakenAt:
    """The earliest deadline of all clouds' notices, as far as this rank has heard."""

    def __init__(self) -> None:
        self._at = math.inf
        self._last_message = ""

    def look(self, group: RankGroup, notice: Notice | None) -> float:
        """Return it in monotonic seconds, infinite without a notice; the other ranks learn of an earlier one.

        Args:
            group: The ranks.
            notice: That of this rank's cloud.
        """
        message = group.read_message(TAKEN_IN) if group.world_size > 1 else None
        if message and message != self._last_message:
            self._last_message = message
            self._at = min(self._at, time.monotonic() + float(message))
        if notice and notice.deadline < self._at:
            self._at = notice.deadline
            self._last_message = f"{notice.deadline - time.monotonic():.3f}"
            group.post_message(TAKEN_IN, self._last_message)
        return self._at
