"""The verdict by kind of preemption: what came of each strike, and the worst of each kind.

Strikes of `kill-at-write` are told apart by their places in a save; each has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.rehearsal import evidence, faults
from skyspot.rehearsal.result import Kind, Leg, Row
from skyspot.rehearsal.verdict import Verdict

EXACT, NOT_EXACT, LOST_WORK, STAYS_DOWN = "exact", "NOT exact", "LOST WORK", "stays down"
UNKNOWN, NOT_TRIED = "not checked", "not tried"
INCONCLUSIVE = "inconclusive"
"""Of a run: a strike came too late to show anything. The table has such a strike as NOT_TRIED."""
_WORST = (STAYS_DOWN, LOST_WORK, NOT_EXACT, UNKNOWN, EXACT, NOT_TRIED)
"""Of several strikes of one kind, the first of these stands."""


def outcome(leg: Leg, order: int) -> str:
    """What came of one strike: NOT_TRIED if it was exact, but the attempt after it shows nothing.

    Args:
        leg: Its leg, judged.
        order: Its place among the leg's rows.
    """
    if leg.rows[order].stays_down:
        return STAYS_DOWN
    after = leg.rows[order + 1] if order + 1 < len(leg.rows) else None
    if after is None:
        return UNKNOWN
    if after.kind == "failed" and not leg.finished:
        return STAYS_DOWN
    if after.lost_work:
        return LOST_WORK
    verdict = leg.verdict
    if not leg.finished or verdict is None or not (verdict.exact or verdict.checked):
        return UNKNOWN
    if verdict.cause == evidence.READ_AND_DROPPED:
        return UNKNOWN
    if verdict.exact or verdict.cause == evidence.LOST:
        return NOT_TRIED if after.unproven else EXACT
    return NOT_EXACT


def in_a_word(verdict: Verdict) -> str:
    """The outcome of a run with one strike, by its verdict."""
    if verdict.exact:
        return EXACT
    if verdict.cause in (evidence.LOST, STAYS_DOWN):
        return STAYS_DOWN if verdict.cause == STAYS_DOWN else LOST_WORK
    return NOT_EXACT if verdict.checked else UNKNOWN


Sort = tuple[str, str | None]
"""A kind of strike, and the place in a save where strikes of that kind are told apart by it."""


def sort(kind: str, place: str | None) -> Sort:
    """The sort of a strike."""
    return kind, place if kind == faults.AT_WRITE else None


def table(legs: Sequence[Leg], kinds: Sequence[str], why_not: dict[str, str]) -> list[Kind]:
    """Make the table.

    Args:
        legs: The preempted legs.
        kinds: All kinds that were asked for, in their order.
        why_not: Why a kind was not tried, where that is known.
    """
    found, known = [], cleared(legs)
    for kind in kinds:
        strikes: dict[Sort, list[tuple[str, Row, Leg]]] = {}
        for leg in legs:
            for order, row in enumerate(leg.rows):
                if row.kind == kind and row.hit:
                    strikes.setdefault(_sort(row), []).append((outcome(leg, order), row, leg))
        found += [_of_a_sort(kind, those, known) for those in strikes.values()]
        if not strikes:
            over = "the run was over before"
            if not all(leg.finished for leg in legs):
                over = "an attempt before its turn failed"
            missed = next((row.ended for leg in legs for row in leg.rows if row.kind == kind and row.place), over)
            found.append(Kind(kind, NOT_TRIED, why_not.get(kind, missed)))
    return found


def without_a_turn(kinds: Sequence[str], preemptions: int) -> dict[str, str]:
    """Say of the kinds that get no turn that too few preemptions were asked for.

    Args:
        kinds: All kinds that were asked for. They take turns in the order of faults.KINDS.
        preemptions: How many preemptions.
    """
    count = f"{preemptions} preemption{'s were' if preemptions > 1 else ' was'} asked for"
    ordered = [kind for kind in faults.KINDS if kind in kinds]
    return dict.fromkeys(ordered[preemptions:], count)


def _of_a_sort(kind: str, strikes: list[tuple[str, Row, Leg]], known: set[Sort]) -> Kind:
    # A leg with this strike alone tells more than one with others, and so does one that clears it.
    sure = [
        one
        for one in strikes
        if one[0] not in (UNKNOWN, NOT_TRIED) and (one[2].preempted == 1 or _clears(one[2], one[0]))
    ]
    worst = min(sure or strikes, key=lambda one: (_WORST.index(one[0]), len(_others(one[2], one[1], known))))
    return Kind(kind, worst[0], _why(*worst, len(strikes), known), worst[1].place)


def _why(came: str, row: Row, leg: Leg, count: int, known: set[Sort]) -> str:
    times = f"{count} times; " if count > 1 else ""
    if came == NOT_EXACT and leg.preempted > 1 and (others := _others(leg, row, known)):
        what = "place" if {kind for kind, _ in others} == {faults.AT_WRITE} else "kind"
        return f"{times}{row.ended}; or another {what} of the same run"
    if came == NOT_TRIED:
        return f"{times}{row.ended}, when {leg.rows[leg.rows.index(row) + 1].unproven}"
    return f"{times}{row.ended}"


def _others(leg: Leg, row: Row, known: set[Sort]) -> set[Sort]:
    """The other sorts of strikes of a leg that nothing clears."""
    return {_sort(one) for _, one in _strikes(leg)} - {_sort(row)} - known


def suspects(legs: Sequence[Leg]) -> list[Sort]:
    """Sorts of strikes that may be at fault, though no leg shows that they are, or that they are not."""
    known = cleared(legs)
    found: dict[Sort, bool] = {}
    for leg in _wrong(legs):
        strikes = [(order, row) for order, row in _strikes(leg) if _sort(row) not in known]
        one_sort = len({_sort(row) for _, row in strikes}) == 1
        for order, row in strikes:
            what = outcome(leg, order)
            sure = what in (STAYS_DOWN, LOST_WORK, EXACT) or (one_sort and what == NOT_EXACT)
            found[_sort(row)] = found.get(_sort(row), False) or sure
    return [one for one, sure in found.items() if not sure]


def untried(legs: Sequence[Leg]) -> list[Sort]:
    """Sorts of strikes in exact legs of which none shows anything, because the attempt after each could not."""
    found: dict[Sort, set[str]] = {}
    for leg in legs:
        if leg.verdict and leg.verdict.exact:
            for order, row in _strikes(leg):
                found.setdefault(_sort(row), set()).add(outcome(leg, order))
    return [one for one, outcomes in found.items() if outcomes == {NOT_TRIED}]


def before_the_last(legs: Sequence[Leg]) -> list[Sort]:
    """Suspects that never were the last strike of a leg that went wrong: most likely that one did the damage."""
    last = {_sort(strikes[-1][1]) for leg in _wrong(legs) if (strikes := _strikes(leg))}
    return [one for one in suspects(legs) if one not in last]


def cleared(legs: Sequence[Leg]) -> set[Sort]:
    """Sorts of strikes of which a leg that was to tell them apart shows that they are not at fault."""
    return {_sort(row) for leg in legs for order, row in _strikes(leg) if leg.apart and outcome(leg, order) == EXACT}


def _wrong(legs: Sequence[Leg]) -> list[Leg]:
    return [leg for leg in legs if not leg.finished or (leg.verdict and leg.verdict.checked and not leg.verdict.exact)]


def _strikes(leg: Leg) -> list[tuple[int, Row]]:
    """The strikes of a leg that hit, each with its place among the rows."""
    return [(order, row) for order, row in enumerate(leg.rows) if row.hit and row.struck]


def _clears(leg: Leg, what: str) -> bool:
    return leg.apart and what == EXACT


def _sort(row: Row) -> Sort:
    return sort(row.kind, row.place)
