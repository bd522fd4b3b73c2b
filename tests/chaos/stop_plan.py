"""The plan of the campaign of stops: in which phase each one comes, by which word, and whether its save fits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WHOLE = 200
MUST_FIT = 160
"""So many stops of a whole campaign must fit their notice."""
EPISODE = 10
"""Stops of one run, one after another; the last one comes in its final export."""

LAST_PHASE = "the final export"
BEFORE_STEPS = ("import", "rendezvous", "model download", "data preparation", "first batch")
AMID_STEPS = ("an ordinary step", "accumulation", "torch.compile", "evaluation", "a save under way", "pruning")
PHASES = (*BEFORE_STEPS, *AMID_STEPS, LAST_PHASE)
OF_RANK_0 = ("model download", "data preparation", "a save under way", "pruning", LAST_PHASE)
"""The phases that rank 0 alone passes through."""
SAVES = ("a save under way", "pruning", LAST_PHASE)
"""The phases with saves before the stop."""
POINTS = ("folder-made", "share-half", "share-written", "state-written", "manifest-half", "manifest-written")


@dataclass(frozen=True)
class Word:
    """How a stop is announced."""

    first: str
    """A signal and where it is sent (`SIGTERM launcher`), or a cloud."""
    second: str = ""
    """What follows once the first was heard; empty: nothing."""
    shell: bool = False
    """A shell (`bash -c`) stands in front of the launcher."""

    @property
    def clouds(self) -> list[str]:
        return [part for part in (self.first, self.second) if part in CLOUDS]


CLOUDS = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
"""The notice that each cloud gives, in seconds."""
SIGNAL_S = 30.0
"""The notice of a signal: the grace of the launcher."""
WORDS = {
    "SIGTERM to the launcher": Word("SIGTERM launcher"),
    "SIGTERM to one rank": Word("SIGTERM rank"),
    "SIGTERM to the process group": Word("SIGTERM group"),
    "SIGTERM to every process": Word("SIGTERM tree"),
    "SIGTERM to a shell and every process below it": Word("SIGTERM tree", shell=True),
    "SIGUSR1 to the launcher": Word("SIGUSR1 launcher"),
    "AWS's notice": Word("aws"),
    "Google Cloud's notice": Word("gcp"),
    "Azure's notice": Word("azure"),
    "SIGTERM twice": Word("SIGTERM launcher", "SIGTERM launcher"),
    "AWS's notice, then SIGTERM": Word("aws", "SIGTERM launcher"),
    "SIGTERM, then Azure's notice": Word("SIGTERM launcher", "azure"),
}


@dataclass(frozen=True)
class Stop:
    """One stop, as it is planned."""

    number: int
    phase: str
    word: str
    ranks: int
    at_rank: int
    """The rank that is in the phase; a signal to one rank goes to it."""
    notice_s: float
    """Seconds from the first word until the machine is taken."""
    save_s: float
    """Seconds that each save takes longer than it would."""
    point: str
    """Of a save under way: the point of the protocol at which the stop comes."""

    @property
    def fits(self) -> bool:
        """The rule, fixed before the run: the stated seconds of a save are less than the notice."""
        return self.save_s < self.notice_s


def plan(seed: int, count: int) -> list[Stop]:
    """Draw the stops; one plan begins as a longer one of the same seed does."""
    draw = random.Random(f"stops/{seed}")
    phases, words = _in_rounds(draw, PHASES[:-1]), _in_rounds(draw, tuple(WORDS))
    return [
        _stop(draw, number, LAST_PHASE if number % EPISODE == EPISODE - 1 else next(phases), next(words))
        for number in range(count)
    ]


def _stop(draw: random.Random, number: int, phase: str, name: str) -> Stop:
    word = WORDS[name]
    ranks = draw.randint(1, 2 if word.shell else 4)  # Behind a shell, the ranks are started cold.
    at_rank = draw.randrange(ranks)
    if phase in OF_RANK_0 or word.first in CLOUDS:  # Rank 0 hears the cloud of its machine.
        at_rank = 0
    notice_s, save_s = CLOUDS.get(word.first, SIGNAL_S), draw.choice((0.0, 0.2, 0.8))
    if draw.random() < 0.2 and phase in AMID_STEPS:
        notice_s, save_s = 2.0, 4.0
    return Stop(number, phase, name, ranks, at_rank, notice_s, save_s, draw.choice(POINTS))


def _in_rounds(draw: random.Random, all_of_them: Sequence[str]) -> Iterator[str]:
    """Each of them once, in any order, again and again."""
    while True:
        yield from draw.sample(all_of_them, len(all_of_them))
