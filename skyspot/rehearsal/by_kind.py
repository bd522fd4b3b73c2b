"""The verdict by kind of preemption: what came of each strike, and the worst of each kind."""

from __future__ import annotations

from collections.abc import Sequence

from skyspot.rehearsal import evidence
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


def table(legs: Sequence[Leg], kinds: Sequence[str], why_not: dict[str, str]) -> list[Kind]:
    """Make the table.

    Args:
        legs: The preempted legs.
        kinds: All kinds that were asked for, in their order.
        why_not: Why a kind was not tried, where that is known.
    """
    found = []
    for kind in kinds:
        strikes = [
            (outcome(leg, order), row, leg)
            for leg in legs
            for order, row in enumerate(leg.rows)
            if row.kind == kind and row.hit
        ]
        if not strikes:
            found.append(Kind(kind, NOT_TRIED, why_not.get(kind, "the run was over before")))
            continue
        # A leg with this strike alone tells more than one with others.
        alone = [one for one in strikes if one[2].preempted == 1 and one[0] != UNKNOWN] or strikes
        worst = min(alone, key=lambda one: _WORST.index(one[0]))
        found.append(Kind(kind, worst[0], _why(worst[0], worst[1], worst[2], len(strikes)), worst[1].place))
    return found


def _why(what: str, row: Row, leg: Leg, count: int) -> str:
    times = f"{count} times; " if count > 1 else ""
    if what == NOT_EXACT and leg.preempted > 1:
        others = len({one.kind for one in leg.rows if one.hit and one.kind not in ("finished", "failed", row.kind)})
        if others:
            return f"{times}{row.ended}; or another kind of the same run"
    return f"{times}{row.ended}"


def suspects(legs: Sequence[Leg]) -> list[str]:
    """Kinds that may be at fault, though no leg of that kind alone shows it."""
    found: dict[str, bool] = {}
    for leg in legs:
        if leg.finished and (leg.verdict is None or not leg.verdict.checked or leg.verdict.exact):
            continue
        strikes = [(order, row) for order, row in enumerate(leg.rows) if row.kind not in ("finished", "failed")]
        one_kind = len({row.kind for _, row in strikes}) == 1
        for order, row in strikes:
            if row.hit:
                what = outcome(leg, order)
                sure = what in (STAYS_DOWN, LOST_WORK, EXACT) or (one_kind and what == NOT_EXACT)
                found[row.kind] = found.get(row.kind, False) or sure
    return [kind for kind, sure in found.items() if not sure]
