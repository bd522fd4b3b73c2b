"""Prices as tables: the ladder and the comparison of `skyspot plan`, and what `launch` shows of them."""

from __future__ import annotations

import re
import time

from rich.console import Console

from skyspot.cli.columns import fold, new_table, say, show
from skyspot.cli.format import ago, many
from skyspot.money.comparison import ON_DEMAND
from skyspot.money.plan import TaskPlan, limit_passed, rung_saving
from skyspot.money.prices import CUT, NEVER, OFFERED, Place, RungPrice, saving
from skyspot.money.pricing import Market
from skyspot.rehearsal.limits import format_duration
from skyspot.wording import first_few

SHOWN = 3
"""Places of a rung that are shown without --all."""
OLD_S = 7 * 86400.0
"""A catalog of that age is named old; SkyPilot itself refreshes most of them after hours."""
REFRESH = "`sky gpus list --all`"
"""The command with which SkyPilot downloads its catalogs, or newer ones."""
_WIDE = 10_000


def show_ladder(plan: TaskPlan, everything: bool) -> None:
    """Print the rungs with the places that offer them, and what there is to say of them."""
    console = Console(highlight=False)
    width = console.width if console.is_terminal else _WIDE
    total = plan.length is not None
    table = new_table("", "machine", "where", "spot", "on-demand", "saves", *(["total"] if total else []),
                      right=("spot", "on-demand", "saves", "total"))  # fmt: skip
    blocks = [_block(rung, plan, everything) for rung in plan.rungs]
    cells = [line for block in blocks for line in block]
    taken = [max(len(column), *(len(line[at]) for line in cells)) for at, column in _heads(total)]
    left = width - 3 - sum(size + 2 for size in taken)
    for line in cells:
        where = fold(re.split(r"(?<=[/ ])(?!$)", line[2]), "", left)
        table.add_row(*line[:2], where, *line[3 : 7 if total else 6])
    show(table)
    say(ladder_lines(plan))


def _heads(total: bool) -> list[tuple[int, str]]:
    return [(1, "machine"), (3, "spot"), (4, "on-demand"), (5, "saves"), *([(6, "total")] if total else [])]


def _block(rung: RungPrice, plan: TaskPlan, everything: bool) -> list[list[str]]:
    """The lines of one rung, each of seven cells: what is asked for, its cheapest places, how many there are."""
    market = "spot" if rung.use_spot else "on-demand"
    states = {OFFERED: "", CUT: "cut off", NEVER: "never offered"}
    state = states.get(rung.status, "price unknown")
    head = [str(rung.number), rung.accelerators, f"{market}, {rung.where or 'anywhere'}{state and f': {state}'}"]
    lines = [[*head, "", "", "", ""]]
    shown = rung.places if everything else rung.places[:SHOWN]
    lines += [_place(place, rung, plan) for place in shown]
    count, regions = len(rung.places), many(rung.regions, "region")
    if count > 1:
        said = f"{count} places" if len(shown) == count else f"shown {len(shown)} of {count} places (--all)"
        spreads = [rung.spread(use_spot) for use_spot in (True, False)]
        lines.append(
            ["", "  dearest", f"{said}, {regions}", *(_usd(one[1] if one else None) for one in spreads), "", ""]
        )
    return lines


def _place(place: Place, rung: RungPrice, plan: TaskPlan) -> list[str]:
    usd = place.usd_per_hour(rung.use_spot)
    saved = saving(usd, place.on_demand_usd_per_hour) if rung.use_spot else None
    return ["", f"  {place.instance_type}", place.infra, _usd(place.spot_usd_per_hour),
            _usd(place.on_demand_usd_per_hour), _percent(saved), _usd(plan.total_usd(usd))]  # fmt: skip


def ladder_lines(plan: TaskPlan) -> list[str]:
    """What there is to say of a ladder's prices: rungs without a price, and remarks; the same remark once."""
    lines: dict[str, list[str]] = {}
    for rung in plan.rungs:
        passed = limit_passed(rung)
        for text in (rung.why, passed if passed != rung.why else "", *rung.remarks):
            if text:
                lines.setdefault(text, []).append(str(rung.number))
    return [f"{_rungs(numbers).capitalize()}: {text.rstrip('.')}." for text, numbers in lines.items()]


def _rungs(numbers: list[str]) -> str:
    return f"rung{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def show_comparison(plan: TaskPlan) -> None:
    """Print the ways to do the training, before and with the expected loss."""
    losses = plan.losses
    what = plan.length.why if plan.length else "one hour of training"
    spot = any(way.name != ON_DEMAND for way in plan.ways)
    every, recovery, interval, cost = map(
        format_duration, (losses.between_s, losses.recovery_s, losses.interval_s, losses.save_cost_s)
    )
    expected = (
        f" Expected: a preemption every {every}, {recovery} until it trains again, a save every {interval} that costs "
        f"{cost}."
    )
    head = f"\nThe cost of {what}, on {many(plan.nodes, 'node')}.{expected if spot else ''}"
    say([head])
    columns = ("", "USD/h", "hours", "total", "saves", "expected\nhours", "expected\ntotal", "expected\nsaves")
    table = new_table(*columns, right=columns[1:])
    for way in plan.ways:
        lossless = way.name == ON_DEMAND
        table.add_row(
            way.name, _usd(way.usd_per_hour), _hours(way.hours), _usd(way.usd), _percent(way.saving),
            _hours(way.expected_hours) if way.expected_hours else "never ends",
            _usd(way.expected_usd), "" if lossless else _percent(way.expected_saving),
        )  # fmt: skip
    show(table)
    notes = []
    if not plan.stated and spot:
        notes.append(
            "The mix takes as many hours on each spot rung, at the same speed; "
            "--prices ONDEMAND,SPOT_ONE,SPOT_MANY,MIX:HOURS states another."
        )
    if not plan.length:
        notes.append("Add --hours H, or --steps N with --step-seconds S or --speed-of RUN, for the whole training.")
    say(notes)


def market_lines(market: Market) -> list[str]:
    """Where the prices are from, how old they are, and what is wrong with them."""
    names, old = [], False
    for cloud, catalog in market.catalogs.items():
        at = catalog.downloaded_at
        old = old or (at is not None and time.time() - at > OLD_S)
        names.append(f"{cloud} ({f'downloaded {ago(at)}' if at is not None else 'age unknown'})")
    lines = list(market.problems)
    if names:
        which = " Clouds that SkyPilot has enabled." if market.is_enabled else ""
        refresh = f" {REFRESH} downloads newer ones." if old else ""
        lines.append(f"Prices: SkyPilot's catalogs of {first_few(names, 6)}, in USD an hour and node.{which}{refresh}")
    if market.stated:
        lines.append(f"Prices: {len(market.stated)} of skyspot.yaml, which replace a catalog's.")
    if not names and not market.stated:
        lines.append(no_catalogs())
    return lines


def no_catalogs() -> str:
    """How to get prices."""
    return (
        f"No price catalog is on this machine. {REFRESH} has SkyPilot download them; or state prices in skyspot.yaml, "
        "like prices: [{accelerators: 'A100:8', spot: 9.83, on_demand: 32.77}]."
    )


def price_columns(plan: TaskPlan) -> dict[str, list[str]]:
    """The columns that a launch adds to its table of rungs: the cheapest price of a node, the saving, the total."""
    if not any(rung.places for rung in plan.rungs):
        return {}
    found = {
        "USD/h": [_usd(rung.usd_per_hour) or "-" for rung in plan.rungs],
        "saves": [_percent(rung_saving(rung)) or "-" for rung in plan.rungs],
    }
    if plan.length:
        found["total USD"] = [_usd(plan.total_usd(rung.usd_per_hour)) or "-" for rung in plan.rungs]
    return found


def price_lines(plan: TaskPlan) -> list[str]:
    """What a launch says of prices, below its table of rungs."""
    lines = []
    if any(rung.places for rung in plan.rungs):
        lines.append("of a node in the cheapest place, in USD an hour; `skyspot plan` shows the others")
        if plan.length:
            lines.append(f"total USD: {plan.length.why}, without preemptions")
    reasons: dict[str, list[str]] = {}
    for rung in plan.rungs:
        if reason := rung.why or limit_passed(rung):
            reasons.setdefault(reason, []).append(str(rung.number))
    for reason, numbers in reasons.items():
        where = (
            f"rung{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}: " if len(plan.rungs) > len(numbers) else ""
        )
        lines.append(f"{where}{reason}")
    if not lines or plan.rungs[0].why.startswith("no price catalog"):
        lines.append(f"{REFRESH} has SkyPilot download its catalogs; skyspot.yaml can state prices, too")
    return [f"{'' if at else 'Prices:':<13}{text}" for at, text in enumerate(lines)]


def _usd(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _hours(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}".replace("%", " %")
