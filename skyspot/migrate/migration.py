"""A SkyPilot YAML in the spelling of another year -> in today's (0.14.1), as text, so that the diff is the change.

Each rule finds the first place that it is for and edits it; it is asked again until it finds none. What SkyPilot takes
today stays as it is, and so does what it never took: that is for `lint`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from skyspot.errors import UsageError, shown
from skyspot.migrate import rungs
from skyspot.task.emitter import BOOLEANS, flow, quoted
from skyspot.task.nodes import MappingNode, Node, ScalarNode, at, compose, entries, entry, value
from skyspot.task.sheet import Sheet, drop, insert, put, put_in, rename, unwrap

_RESOURCES = (("resources",), ("resources", "ordered", "*"), ("resources", "any_of", "*"))
_NAMES = {
    "spot_recovery": "job_recovery",  # until 0.7
    "gpus": "accelerators",
    "max_price": "max_hourly_cost",  # never SkyPilot's, but in many a tutorial
}
_MORE_NAMES = (
    (("resources",), "candidates", "any_of"),  # of `sky bench`, until 0.10
    *(((*place, "accelerator_args"), "tf_version", "runtime_version") for place in _RESOURCES),  # until 0.2
)
_SAID = {
    "max_price": ", which is no bid: machines that the catalog prices higher are left out, the others cost what they "
    "cost",
    "candidates": ": SkyPilot takes the cheapest of them that is available",
}
_TASK_NAMES = {"api_access": "api_server_access"}  # of 0.12 alone
_BOOLEANS = (
    *((*place, "use_spot") for place in _RESOURCES),
    *((*place, "autostop") for place in _RESOURCES),
    *((*place, "autostop", "down") for place in _RESOURCES),
    *((*place, "accelerator_args", key) for place in _RESOURCES for key in ("tpu_vm", "gcp_queued_resource")),
    ("file_mounts", "*", "persistent"),
    ("file_mounts", "*", "config", "*", "read_only"),
    ("api_server_access",),
)
_NUMBERS = (("num_nodes",), *((*place, "max_hourly_cost") for place in _RESOURCES))
_STRATEGIES = (
    *((*place, "job_recovery") for place in _RESOURCES),
    *((*place, "job_recovery", "strategy") for place in _RESOURCES),
)
_NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")
_PRICE = re.compile(rf"(?:USD|\$)? *({_NUMBER.pattern}) *(?:USD|\$)? *(?:/ *h(?:r|our)?)?", re.IGNORECASE)
# The sections that rules change; all else in a file has to mean the same afterwards.
_CHANGED = {
    "resources",
    "max_restarts_on_errors",
    "experimental",
    "config",
    "num_nodes",
    *_TASK_NAMES,
    *_TASK_NAMES.values(),
}


@dataclass(frozen=True)
class Migrated:
    """A task YAML in today's spelling."""

    text: str
    changes: tuple[str, ...]
    """What was changed, a sentence each; the lines are those of the file as it was."""


def to_today(text: str, given: Collection[str] = ()) -> Migrated:
    """A plain SkyPilot YAML in the spelling that SkyPilot 0.14.1 takes; comments and layout stay.

    Args:
        text: The YAML; where it needs nothing, it comes back as it is.
        given: Variables and secrets that get their values elsewhere (`--env`, `--secret`).

    Raises:
        UsageError: something in it means nothing today, or two things; by its line, with the remedy.
    """
    sheet = Sheet.of(text)
    _refuse_valueless(compose(text), given)
    for rule in (
        _name,
        _bare,
        _config,
        _no_envs,
        _restarts,
        rungs.one_place,
        rungs.one_recovery,
        rungs.recover_on_75,
    ):
        while (edited := rule(sheet, compose(sheet.text))) is not None:
            sheet = edited
    changes = tuple(f"line {number}: {sentence}" for number, sentence in sorted(sheet.said, key=lambda said: said[0]))
    if changes and _elsewhere(sheet.text) != _elsewhere(text):
        raise UsageError(f"anchors or tags are in the way of an edit. By hand: {'; '.join(changes)}")
    return Migrated(sheet.text, changes)


def _refuse_valueless(root: MappingNode, given: Collection[str]) -> None:
    """As SkyPilot does: a variable that is empty by mistake would fail only on machines that are paid for."""
    found = [key for _, (key, node) in at(root, "envs", "*") if _null(node) and str(key.value) not in given]
    if found:
        names, one = ", ".join(str(key.value) for key in found), str(found[0].value)
        lines = ", ".join(str(key.start_mark.line + 1) for key in found)
        raise UsageError(
            f"line{'s' if len(found) > 1 else ''} {lines}: {names} in `envs` without a value. "
            f'Give one, --env {one}=... (a secret: --secret {one}), or write {one}: "" for an empty one'
        )


def _null(node: Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _elsewhere(text: str) -> str:
    """What a task means outside the sections that rules change."""
    meant = {key: found for key, found in entries(compose(text)).items() if key not in _CHANGED}
    meant["envs"] = meant.get("envs") or {}
    meant["file_mounts"] = _unquoted(meant.get("file_mounts"))
    return repr(meant)


def _unquoted(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _unquoted(item) for key, item in found.items()}
    return BOOLEANS.get(found.strip().lower(), found) if isinstance(found, str) else found


# -- rules -------------------------------------------------------------------------------------------------------------


def _name(sheet: Sheet, root: MappingNode) -> Sheet | None:
    names = [(path, old, new) for path in _RESOURCES for old, new in _NAMES.items()]
    for path, old, new in [*names, *_MORE_NAMES, *(((), old, new) for old, new in _TASK_NAMES.items())]:
        for mapping, (key, node) in at(root, *path, old):
            twin = entry(mapping, new) or (entry(mapping, "ordered") if old == "candidates" else None)
            if twin and _alike(new, value(node), value(twin[1])):
                said = f"{old} dropped: {new} in line {sheet.line(twin[0])} says the same"
                return sheet.say(key, said).edited(drop(sheet.text, mapping, old))
            if twin:
                raise UsageError(
                    f"line {sheet.line(key)}: {old} is {new} today, and line {sheet.line(twin[0])} gives that another "
                    f"value. Keep the one that you mean, as {new}"
                )
            sheet = sheet.say(key, f"{old} -> {new}{_SAID.get(old, '')}")
            if old == "max_price":
                sheet = _priced(sheet, key, node)
            if old == "tf_version" and isinstance(node, ScalarNode) and not isinstance(value(node), str):
                sheet = sheet.edited(put(sheet.text, (key, node), quoted(node.value)))
            return sheet.edited(rename(sheet.text, key, new))
    return None


def _alike(name: str, one: Any, other: Any) -> bool:
    if name == "job_recovery":
        return rungs.recovery(one) == rungs.recovery(other)
    return str(one) == str(other)


def _priced(sheet: Sheet, key: Node, node: Node) -> Sheet:
    """`"$3.50/h"` -> 3.50. The price stands behind its key: the marks of the key still hold afterwards."""
    price = value(node)
    if price is None or (isinstance(price, (int, float)) and price > 0):
        return sheet
    found = _PRICE.fullmatch(str(price).strip())
    if not found or not float(found[1]):
        raise UsageError(
            f"line {sheet.line(key)}: max_price: {shown(str(price))} is no price. Say what a node may cost an hour, "
            "in USD: max_hourly_cost: 3.50"
        )
    return sheet.edited(put(sheet.text, (key, node), found[1]))


def _bare(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """A boolean or a number in quotes is a string, which SkyPilot refuses; `NONE` is no strategy, `none` is."""
    for paths, meant in ((_BOOLEANS, _boolean), (_NUMBERS, _number), (_STRATEGIES, _none)):
        for path in paths:
            for _, (key, node) in at(root, *path):
                if isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:str":
                    new = meant(node.value)
                    if new is not None:
                        said = f"{key.value}: {shown(node.value)} -> {new}"
                        return sheet.say(key, said).edited(put(sheet.text, (key, node), new))
    return None


def _boolean(text: str) -> str | None:
    found = BOOLEANS.get(text.strip().lower())
    return None if found is None else str(found).lower()


def _number(text: str) -> str | None:
    return text.strip() if _NUMBER.fullmatch(text.strip()) else None


def _none(text: str) -> str | None:
    return "none" if text.strip().lower() == "none" != text else None


def _config(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """`experimental: config_overrides:` of 0.6 to 0.10 is `config:`."""
    outer = entry(root, "experimental")
    inner = entry(outer[1], "config_overrides") if outer else None
    if not outer or not inner or len(outer[1].value) != 1 or not isinstance(inner[1], MappingNode):
        return None
    other = entry(root, "config")
    if other:
        raise UsageError(
            f"line {sheet.line(outer[0])}: experimental.config_overrides is `config` today, which stands in line "
            f"{sheet.line(other[0])} already. Move its entries there"
        )
    sheet = sheet.say(outer[0], "experimental.config_overrides -> config").edited(unwrap(sheet.text, outer, inner))
    return sheet.edited(rename(sheet.text, outer[0], "config"))


def _no_envs(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """SkyPilot fails on `envs:` with nothing below it."""
    found = entry(root, "envs")
    if not found or not _null(found[1]):
        return None
    return sheet.say(found[0], "envs: nothing -> {}").edited(put(sheet.text, found, "{}"))


def _restarts(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """`max_restarts_on_errors` at the top, as many a guide has it, belongs in `resources.job_recovery`."""
    found, resources = entry(root, "max_restarts_on_errors"), entry(root, "resources")
    asked = value(resources[1]) if resources else None
    if not found or type(value(found[1])) is not int or not isinstance(asked, (dict, type(None))):
        return None
    recovery = entry(resources[1], "job_recovery") if resources else None
    stated = (asked or {}).get("job_recovery")
    listed = [rung for name in ("ordered", "any_of") for rung in at(root, "resources", name, "*", "job_recovery")]
    if listed or (stated is not None and not recovery):
        return None  # Which of them is meant, nobody can tell: lint names it.
    count = value(found[1])
    known = stated if isinstance(stated, dict) else {} if stated in (None, "none") else {"strategy": stated}
    if known.get("max_restarts_on_errors", count) != count:
        raise UsageError(
            f"line {sheet.line(found[0])}: max_restarts_on_errors: {count} contradicts the one in "
            f"resources.job_recovery. Keep the one that you mean, there"
        )
    said = sheet.say(found[0], "max_restarts_on_errors is in resources.job_recovery now, where SkyPilot takes it")
    if "max_restarts_on_errors" not in known:
        if recovery and isinstance(recovery[1], MappingNode):
            said = said.edited(insert(recovery[1], "max_restarts_on_errors", str(count)))
        else:
            new = flow({**known, "max_restarts_on_errors": count})
            said = said.edited(put_in(said.text, "resources", "job_recovery", new))
    return said.edited(drop(said.text, compose(said.text), "max_restarts_on_errors"))
