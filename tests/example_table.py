"""The examples as the tests rehearse them. An example that is not listed has the values of `Example()`.

Every example reads its number of steps from STEPS, and the run's folder from SKYSPOT_CHECKPOINT_DIR.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from support import REPO

FOLDER = REPO / "examples"


@dataclass(frozen=True)
class Example:
    """How an example is rehearsed, and what the verdict must say."""

    steps: int = 80
    """Steps of a rehearsal: at least four saves."""
    processes: tuple[int, ...] = (1,)
    """The numbers of processes that it can train on."""
    says: str = "bit-identical"
    """The beginning of the verdict."""
    needs: tuple[str, ...] = ()
    """Modules that it imports beside those of the trainer."""
    slow: bool = False
    """True: its short run takes more than some seconds, and is left out of the quick tests."""


EXAMPLES: dict[str, Example] = {}


def entry(safe: Path) -> Example:
    """What the table says of an example."""
    return EXAMPLES.get(safe.stem, Example())
