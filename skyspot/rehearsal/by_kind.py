"""The verdict by kind of preemption: what came of each strike, and the worst of each kind.

Strikes of `kill-at-write` are told apart by their places in a save; each has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.rehearsal import evidence, faults
from skyspot.rehearsal.result import Kind, Leg, Row

EXACT, NOT_EXACT, LOST_WORK, STAYS_DOWN = "exact", "NOT exact", "LOST WORK", "stays down"
UNKNOWN, NOT_TRIED = "not checked", "not tried"
_WORST = (STAYS_DOWN, LOST_WORK, NOT_EXACT, UNKNOWN, EXACT)
"""Of several strikes of one kind, the first of these stands."""


def outcome(leg: Leg, order: int) -> str:
    """What came of one strike.

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
        return EXACT
    return NOT_EXACT


def sort(row: Row) -> tuple[str, str | None]:
    """The kind of a strike, and its place where strikes of that kind are told apart by it."""
    return row.kind, row.place if row.kind == faults.AT_WRITE else None


def table(legs: Sequence[Leg], kinds: Sequence[str], why_not: dict[str, str]) -> list[Kind]:
    """Make the table.

    Args:
        legs: The preempted legs.
        kinds: All kinds that were asked for, in their order.
        why_not: Why a kind was not tried, where that is known.
    """
    found = []
    for kind in kinds:
        strikes: dict[tuple[str, str | None], list[tuple[str, Row, Leg]]] = {}
        for leg in legs:
            for order, row in enumerate(leg.rows):
                if row.kind == kind and row.hit:
                    strikes.setdefault(sort(row), []).append((outcome(leg, order), row, leg))
        found += [_of_a_sort(kind, those) for those in strikes.values()]
        if not strikes:
            over = "the run was over before"
            if not all(leg.finished for leg in legs):
                over = "an attempt before its turn failed"
            found.append(Kind(kind, NOT_TRIED, why_not.get(kind, over)))
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


def _of_a_sort(kind: str, strikes: list[tuple[str, Row, Leg]]) -> Kind:
    # A leg with this strike alone tells more than one with others.
    alone = [one for one in strikes if one[2].preempted == 1 and one[0] != UNKNOWN] or strikes
    worst = min(alone, key=lambda one: _WORST.index(one[0]))
    return Kind(kind, worst[0], _why(worst[0], worst[1], worst[2], len(strikes)), worst[1].place)


def _why(came: str, row: Row, leg: Leg, count: int) -> str:
    times = f"{count} times; " if count > 1 else ""
    if came == NOT_EXACT and leg.preempted > 1:
        others = {sort(one) for one in leg.rows if one.hit and one.kind not in ("finished", "failed")} - {sort(row)}
        if others:
            what = "place" if {kind for kind, _ in others} == {faults.AT_WRITE} else "kind"
            return f"{times}{row.ended}; or another {what} of the same run"
    return f"{times}{row.ended}"


def suspects(legs: Sequence[Leg]) -> list[tuple[str, str | None]]:
    """Sorts of strikes that may be at fault, though no leg of that sort alone shows it."""
    found: dict[tuple[str, str | None], bool] = {}
    for leg in legs:
        if leg.finished and (leg.verdict is None or not leg.verdict.checked or leg.verdict.exact):
            continue
        strikes = [(order, row) for order, row in enumerate(leg.rows) if row.kind not in ("finished", "failed")]
        one_sort = len({sort(row) for _, row in strikes}) == 1
        for order, row in strikes:
            if row.hit:
                what = outcome(leg, order)
                sure = what in (STAYS_DOWN, LOST_WORK, EXACT) or (one_sort and what == NOT_EXACT)
                found[sort(row)] = found.get(sort(row), False) or sure
    return [one for one, sure in found.items() if not sure]
