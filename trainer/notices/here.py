"""The metadata service of this machine: of the cloud that is named, else the one that answers."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress

from trainer.notices.aws import Aws
from trainer.notices.azure import Azure
from trainer.notices.gcp import Gcp
from trainer.notices.source import Source

SOURCES: dict[str, type[Aws] | type[Gcp] | type[Azure]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}
"""The clouds whose metadata service announces that a machine will be taken. The others send a signal at most."""
PROBE_S = 2.0
"""The time in which a metadata service must answer to be found."""


def source_of(cloud: str) -> Source | None:
    """The metadata service of a cloud; None if it announces nothing."""
    return SOURCES[cloud]() if cloud in SOURCES else None


def is_spot_here(cloud: str) -> bool | None:
    """True if the metadata service says that this is a spot machine, False if it says that it is none; else None.

    Args:
        cloud: This machine's, in small letters.
    """
    with suppress(Exception):
        return SOURCES[cloud]().is_spot()
    return None


def probe() -> Source | None:
    """Ask all services side by side; the first that answers as its cloud does is this machine's. Takes `PROBE_S`."""
    answers: queue.SimpleQueue[Source | None] = queue.SimpleQueue()
    sources = [make() for make in SOURCES.values()]

    def ask(source: Aws | Gcp | Azure) -> None:
        found = False
        with suppress(Exception):
            found = source.is_here()
        answers.put(source if found else None)

    for source in sources:
        threading.Thread(target=ask, args=(source,), daemon=True, name="probe").start()
    end, here = time.monotonic() + PROBE_S, None
    for _ in sources:
        with suppress(queue.Empty):
            here = here or answers.get(timeout=max(0.0, end - time.monotonic()))
    for source in sources:
        if source is not here:
            source.close()
    return here
