"""The limits of a run in money and time, and the prices that they are reckoned with, as variables of its task.

The trainer reads them (trainer/attempt/limits.py, trainer/attempt/price.py). Nobody's edit of a written task counts as
one if only these lines differ, because a launch renews them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from itertools import takewhile

from skyspot.errors import UsageError, shown
from skyspot.task import document, emitter, nodes, pipeline, sheet, started
from skyspot.task.document import Task
from skyspot.task.durations import DURATION, read_duration
from skyspot.task.mounts import CHECKPOINT_DIR
from skyspot.task.nodes import MappingNode, compose, entry
from skyspot.task.options import MAX_SPEND
from skyspot.task.shell import Command, starts_our_trainer

DEADLINE, ALLOWANCE, PRICES = "SKYSPOT_DEADLINE", "SKYSPOT_SPEND_ALLOWANCE", "SKYSPOT_PRICES"
NONE = "none"
"""The value of an option that takes a limit away."""
LEAST_USD, MOST = 1e-9, 1e9
"""The amounts that the trainer takes (trainer/attempt/limits.py); MOST, too, for the seconds of an allowance."""
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
    if text.strip().lower() == NONE:
        return None
    return _number("--max-spend", text, "neither an amount in USD (25) nor `none`")


def _number(option: str, text: str, what: str, least: float = LEAST_USD) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not least <= number < MOST:
        raise UsageError(f"{option}: {shown(text)} is {what}")
    return number


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
        moment = now + read_duration("--deadline", text)
        if moment >= datetime.max.replace(tzinfo=timezone.utc).timestamp() - 1:
            raise UsageError(f"--deadline: {shown(text)} from now on is after the year 9999")
        return moment
    moment = _moment("--deadline", text, None, "neither a time (2026-12-01T08:00), a duration (12h, 2d), nor `none`")
    if moment <= now:
        raise UsageError(f"--deadline: {shown_time(moment)} has passed")
    return moment


def _moment(option: str, text: str, zone: timezone | None, what: str) -> float:
    """The unix time of an ISO time; one without a zone is in `zone`, or in this machine's."""
    try:
        found = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
        moment = (found if found.tzinfo or not zone else found.replace(tzinfo=zone)).timestamp()
        _utc(moment)  # In UTC, too, it has to be in the years 1 to 9999.
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{option}: {shown(text)} is {what}") from None
    return moment


def shown_time(moment: float) -> str:
    """A time for a message: `2026-12-01 08:00 UTC`."""
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def limits_of(task: Task) -> tuple[float | None, float | None]:
    """The limits that a task's envs state: USD, and unix time; None: none.

    Raises:
        UsageError: one of them cannot be read; names the variable.
    """
    spend, deadline, allowance = (task.envs.get(name, "").strip() for name in (MAX_SPEND, DEADLINE, ALLOWANCE))
    if allowance and (spend or deadline):
        _number(ALLOWANCE, allowance, "not a number of seconds", least=0.0)
    return (
        _number(MAX_SPEND, spend, "not an amount in USD (25)") if spend else None,
        _moment(DEADLINE, deadline, timezone.utc, "not a time (2026-12-01T08:00:00Z)") if deadline else None,
    )


def keeps_records(task: Task) -> bool:
    """True if a task starts skyspot's trainer or launcher, or a script that imports the trainer."""
    return task.trainer is not None or started.imports_trainer(task.run.text, task.workdir or "")


def unheld(task: Task) -> str:
    """Why nothing in a task holds limits, as a sentence with the remedy; empty if something does.

    The trainer does; so does the launcher by itself, if it has the run's folder.
    """
    if not keeps_records(task):
        return (
            "this task starts neither skyspot's trainer nor its launcher, which hold the limit. Start its script with "
            "`python -m trainer.launch` (docs/your-own-script.md)"
        )
    ours = [command for command in task.run.commands if starts_our_trainer(command)]
    if any(_has_folder(task, one) for one in ours) or started.imports_trainer(task.run.text, task.workdir or ""):
        return ""
    return (
        "skyspot's launcher holds the limit by the records in the run's folder, but this task gives none. Set "
        f"{CHECKPOINT_DIR} in its envs"
    )


def _has_folder(task: Task, ours: Command) -> bool:
    """True if a command is the trainer, which has the run's folder, or the launcher with one."""
    own = [word.text for word in takewhile(lambda word: not word.text.endswith(".py"), ours.words)]
    return (
        "trainer.launch" not in own
        or any(text.partition("=")[0] == "--checkpoint-dir" for text in own)
        or bool(task.envs.get(CHECKPOINT_DIR))
        or f"{CHECKPOINT_DIR}=" in task.run.text
    )


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
    if why := unheld(found.tasks[0]):
        raise UsageError(f"{first}: {why}")
    values: dict[str, str | None] = {}
    if max_spend is not None:
        usd = read_max_spend(max_spend)
        values[MAX_SPEND] = None if usd is None else _shortest(usd)
    if deadline is not None:
        moment = read_deadline(deadline, now)
        values[DEADLINE] = None if moment is None else _utc(moment)
    if allowance is not None:
        values[ALLOWANCE] = _shortest(read_allowance(allowance))
    for name, value in values.items():
        text = in_each_task(text, partial(_put, name=name, value=value))
    return text


def _shortest(number: float) -> str:
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _utc(moment: float) -> str:
    return f"{datetime.fromtimestamp(round(moment), timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def read_allowance(text: str) -> float:
    """The seconds of `--spend-allowance`; 0 is allowed.

    Raises:
        UsageError: it is no duration, or longer than the trainer takes.
    """
    seconds = 0.0 if re.fullmatch(r"0+[smhd]?", text.strip()) else read_duration("--spend-allowance", text)
    if seconds >= MOST:
        raise UsageError(f"--spend-allowance: {shown(text)} is too long; the longest is {MOST // 86400:.0f}d")
    return seconds


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
    """A task YAML without limits and prices in its envs: what an edit by hand is compared with."""
    if not re.search(rf"\b(?:{_NAMES})\b", body):
        return body
    try:
        return in_each_task(body, _without_limits)
    except UsageError:
        return body  # Nobody but a user makes it unreadable.


def _without_limits(text: str) -> str:
    envs = entry(compose(text), "envs")
    if not envs or not isinstance(envs[1], MappingNode):
        return text
    start, end = envs[0].start_mark.index, sheet.span(text, envs)[1]
    end = next((found.end() for found in sheet.BREAK.finditer(text, end)), len(text))
    section = _IN_FLOW.sub("", _LINE.sub("", text[start:end]))
    return _EMPTY.sub("", text[:start] + section + text[end:])


def with_market(text: str, use_spot: bool) -> str:
    """Have all rungs of a task ask for spot machines, or none of them."""
    return in_each_task(text, lambda part: _with_market(part, use_spot))


def _with_market(text: str, use_spot: bool) -> str:
    while True:
        resources = entry(compose(text), "resources")
        common = resources[1] if resources and isinstance(resources[1], MappingNode) else None
        rungs = _listed(common) if common else []
        stated = [found for one in [common, *rungs] if one and (found := entry(one, "use_spot"))]
        other = next((found for found in stated if (nodes.value(found[1]) is True) is not use_spot), None)
        if other is None:
            break
        text = sheet.applied(text, sheet.put(text, other, "true" if use_spot else "false"))
    in_all = rungs and all(entry(rung, "use_spot") for rung in rungs)  # A rung without it takes the common one.
    if not use_spot or in_all or (common and entry(common, "use_spot")):
        return text
    return sheet.applied(text, sheet.put_in(text, "resources", "use_spot", "true"))


def _listed(resources: MappingNode) -> list[MappingNode]:
    """The rungs in `ordered` and `any_of`."""
    listed = [found[1].value for key in ("ordered", "any_of") if (found := entry(resources, key))]
    return [one for items in listed if isinstance(items, list) for one in items if isinstance(one, MappingNode)]
