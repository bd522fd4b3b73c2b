"""The limits of a run in money and time, and the prices that they are reckoned with, as variables of its task.

The trainer reads them (trainer/attempt/limits.py, trainer/attempt/price.py). Nobody's edit of a written task counts as
one if only these lines differ, because a launch renews them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial

from skyspot.errors import UsageError, shown
from skyspot.task import document, emitter, nodes, pipeline, sheet, started
from skyspot.task.document import Task
from skyspot.task.durations import DURATION, read_duration
from skyspot.task.nodes import MappingNode, compose, entry
from skyspot.task.options import MAX_SPEND

DEADLINE, ALLOWANCE, PRICES = "SKYSPOT_DEADLINE", "SKYSPOT_SPEND_ALLOWANCE", "SKYSPOT_PRICES"
NONE = "none"
"""The value of an option that takes a limit away."""
_NAMES = "|".join((MAX_SPEND, DEADLINE, ALLOWANCE, PRICES))
_VALUE = r"(?:'[^'\n]*'|\"(?:[^\"\\\n]|\\.)*\"|[^'\"\s,}][^\n,}]*)"
_LINE = re.compile(rf"^[ \t]+(?:{_NAMES}): {_VALUE}[ \t]*\r?\n", re.M)
_IN_FLOW = re.compile(rf"(?:{_NAMES}): {_VALUE}(?:, )?")
_EMPTY = re.compile(r"(?<=\n)\r?\nenvs:[ \t]*\r?\n(?=\Z|\S)")


def read_max_spend(text: str) -> float | None:
    """The amount in USD of `--max-spend`; None for `none`.

    Raises:
        UsageError: it is none.
    """
    return None if text.strip().lower() == NONE else _amount("--max-spend", text, ", nor `none`")


def _amount(option: str, text: str, more: str = "") -> float:
    try:
        usd = float(text)
    except ValueError:
        usd = 0.0
    if not 0 < usd < 1e9:
        raise UsageError(f"{option}: {shown(text)} is not an amount in USD, like 25{more}")
    return usd


def read_deadline(text: str, now: float) -> float | None:
    """The unix time of `--deadline`: a time, or a duration from now on; None for `none`.

    A time without a zone is in this machine's zone.

    Raises:
        UsageError: it is neither, or it has passed.
    """
    text = text.strip()
    if text.lower() == NONE:
        return None
    if DURATION.fullmatch(text):
        return now + read_duration("--deadline", text)
    moment = _moment("--deadline", text, None, " nor a duration, like 12h or 2d, nor `none`")
    if moment <= now:
        raise UsageError(f"--deadline: {shown_time(moment)} has passed")
    return moment


def _moment(option: str, text: str, zone: timezone | None, more: str = "") -> float:
    """The unix time of an ISO time; one without a zone is in `zone`, or in this machine's."""
    try:
        found = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
        return (found if found.tzinfo or not zone else found.replace(tzinfo=zone)).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{option}: {shown(text)} is not a time, like 2026-12-01T08:00{more}") from None


def shown_time(moment: float) -> str:
    """A time for a message: `2026-12-01 08:00 UTC`."""
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def limits_of(task: Task) -> tuple[float | None, float | None]:
    """The limits that a task's envs state: USD, and unix time; None: none.

    Raises:
        UsageError: one of them cannot be read; names the variable.
    """
    spend, deadline = (task.envs.get(name, "").strip() for name in (MAX_SPEND, DEADLINE))
    return (
        _amount(MAX_SPEND, spend) if spend else None,
        _moment(DEADLINE, deadline, timezone.utc) if deadline else None,
    )


def holds_limits(task: Task) -> bool:
    """True if a task starts what holds limits: skyspot's trainer or launcher, or a script that imports the trainer."""
    return task.trainer is not None or started.needs_trainer(task.run.text, task.workdir or "")


def with_limits(text: str, max_spend: str | None, deadline: str | None, allowance: str | None, now: float) -> str:
    """Put limits into the envs of a task; None leaves what is there, `none` takes it away.

    Args:
        text: The task YAML.
        max_spend: The value of `--max-spend`.
        deadline: Of `--deadline`.
        allowance: Of `--spend-allowance`.
        now: Unix time, to make a duration a time.

    Raises:
        UsageError: a value makes no sense, or the task holds no limits.
    """
    given = {"--max-spend": max_spend, "--deadline": deadline, "--spend-allowance": allowance}
    first = next((option for option, value in given.items() if value is not None), None)
    if first is None:
        return text
    found = document.read(text)
    if len(found.tasks) != 1:
        raise UsageError(
            f"{first} applies to a single task, but this pipeline has {len(found.tasks)}. Set {MAX_SPEND} (USD) or "
            f"{DEADLINE} (2026-12-01T08:00:00Z) in the envs of each task instead"
        )
    if not holds_limits(found.tasks[0]):
        raise UsageError(
            f"{first}: this task starts neither skyspot's trainer nor its launcher, which hold the limit. Start its "
            "script with `python -m trainer.launch` (docs/your-own-script.md)"
        )
    values: dict[str, str | None] = {}
    if max_spend is not None:
        usd = read_max_spend(max_spend)
        values[MAX_SPEND] = None if usd is None else f"{usd:g}" if float(f"{usd:g}") == usd else repr(usd)
    if deadline is not None:
        moment = read_deadline(deadline, now)
        values[DEADLINE] = None if moment is None else _utc(moment)
    if allowance is not None:
        values[ALLOWANCE] = f"{read_allowance(allowance):g}"
    for name, value in values.items():
        text = in_each_task(text, partial(_put, name=name, value=value))
    return text


def _utc(moment: float) -> str:
    return f"{datetime.fromtimestamp(round(moment), timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def read_allowance(text: str) -> float:
    """The seconds of `--spend-allowance`; 0 is allowed.

    Raises:
        UsageError: it is no duration.
    """
    return 0.0 if re.fullmatch(r"0+[smhd]?", text.strip()) else read_duration("--spend-allowance", text)


def with_prices(text: str, prices: str) -> str:
    """Put prices into the envs of a task, in place of older ones.

    Args:
        text: The text of one task.
        prices: The JSON that the trainer reads; it has no quote of its own.
    """
    assert "'" not in prices
    return sheet.applied(text, sheet.put_in(text, "envs", PRICES, f"'{prices}'"))


def in_each_task(text: str, edit: Callable[[str], str]) -> str:
    """Edit each task of a file."""
    found = pipeline.split(text)
    for number in found.tasks:
        found = found.edited(number, edit)
    return found.text


def _put(text: str, name: str, value: str | None) -> str:
    if value is not None:
        return sheet.applied(text, sheet.put_in(text, "envs", name, emitter.quoted(value)))
    envs = entry(compose(text), "envs")
    if not envs or not isinstance(envs[1], MappingNode) or not entry(envs[1], name):
        return text
    return sheet.applied(text, sheet.drop(text, envs[1], name))


def without_limits(body: str) -> str:
    """A task YAML without limits and prices: what an edit by hand is compared with."""
    if not re.search(rf"\b(?:{_NAMES})\b", body):
        return body
    return _EMPTY.sub("", _IN_FLOW.sub("", _LINE.sub("", body)))


def with_market(text: str, use_spot: bool) -> str:
    """Have all rungs of a task ask for spot machines, or none of them."""
    return in_each_task(text, lambda part: _with_market(part, use_spot))


def _with_market(text: str, use_spot: bool) -> str:
    while True:
        resources = entry(compose(text), "resources")
        if not resources or not isinstance(resources[1], MappingNode):
            return sheet.applied(text, sheet.put_in(text, "resources", "use_spot", "true")) if use_spot else text
        mappings = [resources[1]]
        for key in ("ordered", "any_of"):
            listed = entry(resources[1], key)
            items = listed[1].value if listed and isinstance(listed[1].value, list) else []
            mappings += [item for item in items if isinstance(item, MappingNode)]
        stated = [found for mapping in mappings if (found := entry(mapping, "use_spot"))]
        other = next((found for found in stated if (nodes.value(found[1]) is True) is not use_spot), None)
        if other is None:
            break
        text = sheet.applied(text, sheet.put(text, other, "true" if use_spot else "false"))
    return text if stated or not use_spot else sheet.applied(
        text, sheet.put_in(text, "resources", "use_spot", "true")
    )  # fmt: skip
