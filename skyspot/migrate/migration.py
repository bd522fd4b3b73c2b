"""The migration of a SkyPilot YAML from an older spelling to today's (0.14.1), in its text.

Each rule edits the first place that it applies to, and is repeated until there is none. Spellings that SkyPilot accepts
today stay unchanged. So do those that it never accepted, which `lint` reports.
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
_REMARKS = {
    "max_price": " (not a bid: it excludes machines with a higher catalog price, and changes no price)",
    "candidates": " (SkyPilot takes the cheapest one available)",
}
_TASK_NAMES = {"api_access": "api_server_access"}  # only in 0.12
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
# The sections that rules change; all others must mean the same afterwards.
_CHANGED = {
    "resources",
    "max_restarts_on_errors",
    "experimental",
    "config",
    "num_nodes",
    *_TASK_NAMES,
    *_TASK_NAMES.values(),
    *(path[0] for path, _, _ in _MORE_NAMES),
}


@dataclass(frozen=True)
class Migrated:
    """A task YAML in today's spelling."""

    text: str
    changes: tuple[str, ...]
    """A sentence per change, with the line numbers of the original file."""


def to_today(text: str, given: Collection[str] = ()) -> Migrated:
    """Migrate a plain SkyPilot YAML to the spelling of SkyPilot 0.14.1; comments and layout stay.

    Args:
        text: The YAML; returned unchanged if it is up to date.
        given: Variables and secrets with values from elsewhere (`--env`, `--secret`).

    Raises:
        UsageError: an entry has no meaning today, or contradicts another; names line and remedy.
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
    changes = tuple(f"line {number}: {sentence}" for number, sentence in sorted(sheet.notes, key=lambda note: note[0]))
    if changes and _elsewhere(sheet.text) != _elsewhere(text):
        raise UsageError(f"cannot edit this file because of its anchors or tags. Change by hand: {'; '.join(changes)}")
    return Migrated(sheet.text, changes)


def _refuse_valueless(root: MappingNode, given: Collection[str]) -> None:
    """Refuse variables without a value, as SkyPilot does: they would fail only on a paid machine."""
    found = [key for _, (key, node) in at(root, "envs", "*") if _null(node) and str(key.value) not in given]
    if found:
        names, one = ", ".join(str(key.value) for key in found), str(found[0].value)
        lines = ", ".join(str(key.start_mark.line + 1) for key in found)
        raise UsageError(
            f"line{'s' if len(found) > 1 else ''} {lines}: {names} in `envs` has no value. "
            f'Set one with --env {one}=... (a secret: --secret {one}), or write {one}: "" for an empty value'
        )


def _null(node: Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _elsewhere(text: str) -> str:
    """Return the meaning of a task outside the sections that rules change."""
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
                change = f"removed {old}: {new} on line {sheet.line(twin[0])} has the same value"
                return sheet.noted(key, change).edited(drop(sheet.text, mapping, old))
            if twin:
                raise UsageError(
                    f"line {sheet.line(key)}: {old} is called {new} today, which has another value on line "
                    f"{sheet.line(twin[0])}. Keep only one of them, as {new}"
                )
            sheet = sheet.noted(key, f"{old} -> {new}{_REMARKS.get(old, '')}")
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
    """Convert `"$3.50/h"` to 3.50. The price comes after its key, so the key's position stays valid."""
    price = value(node)
    if price is None or (isinstance(price, (int, float)) and price > 0):
        return sheet
    found = _PRICE.fullmatch(str(price).strip())
    if not found or not float(found[1]):
        raise UsageError(
            f"line {sheet.line(key)}: max_price: {shown(str(price))} is not a price. Give the maximum per node and "
            "hour in USD: max_hourly_cost: 3.50"
        )
    return sheet.edited(put(sheet.text, (key, node), found[1]))


def _bare(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """Unquote booleans and numbers, which SkyPilot refuses as strings, and write the strategy `NONE` as `none`."""
    for paths, meant in ((_BOOLEANS, _boolean), (_NUMBERS, _number), (_STRATEGIES, _none)):
        for path in paths:
            for _, (key, node) in at(root, *path):
                if isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:str":
                    new = meant(node.value)
                    if new is not None:
                        change = f"{key.value}: {shown(node.value)} -> {new}"
                        return sheet.noted(key, change).edited(put(sheet.text, (key, node), new))
    return None


def _boolean(text: str) -> str | None:
    found = BOOLEANS.get(text.strip().lower())
    return None if found is None else str(found).lower()


def _number(text: str) -> str | None:
    return text.strip() if _NUMBER.fullmatch(text.strip()) else None


def _none(text: str) -> str | None:
    return "none" if text.strip().lower() == "none" != text else None


def _config(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """Rename `experimental: config_overrides:` of 0.6 to 0.10 to `config:`."""
    outer = entry(root, "experimental")
    inner = entry(outer[1], "config_overrides") if outer else None
    if not outer or not inner or len(outer[1].value) != 1 or not isinstance(inner[1], MappingNode):
        return None
    other = entry(root, "config")
    if other:
        raise UsageError(
            f"line {sheet.line(outer[0])}: experimental.config_overrides is called `config` today, which exists on "
            f"line {sheet.line(other[0])}. Move its entries there"
        )
    sheet = sheet.noted(outer[0], "experimental.config_overrides -> config").edited(unwrap(sheet.text, outer, inner))
    return sheet.edited(rename(sheet.text, outer[0], "config"))


def _no_envs(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """Fill an empty `envs:`, on which SkyPilot fails."""
    found = entry(root, "envs")
    if not found or not _null(found[1]):
        return None
    return sheet.noted(found[0], "envs: empty -> {}").edited(put(sheet.text, found, "{}"))


def _restarts(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """Move a top-level `max_restarts_on_errors`, as in many guides, to `resources.job_recovery`."""
    found, resources = entry(root, "max_restarts_on_errors"), entry(root, "resources")
    settings = value(resources[1]) if resources else None
    if not found or type(value(found[1])) is not int or not isinstance(settings, (dict, type(None))):
        return None
    recovery = entry(resources[1], "job_recovery") if resources else None
    stated = (settings or {}).get("job_recovery")
    listed = [rung for name in ("ordered", "any_of") for rung in at(root, "resources", name, "*", "job_recovery")]
    if listed or (stated is not None and not recovery):
        return None  # Ambiguous; lint reports it.
    count = value(found[1])
    known = stated if isinstance(stated, dict) else {} if stated in (None, "none") else {"strategy": stated}
    if known.get("max_restarts_on_errors", count) != count:
        raise UsageError(
            f"line {sheet.line(found[0])}: max_restarts_on_errors: {count} contradicts the one in "
            "resources.job_recovery. Keep only one of them, there"
        )
    moved = sheet.noted(found[0], "moved max_restarts_on_errors to resources.job_recovery, where SkyPilot reads it")
    if "max_restarts_on_errors" not in known:
        if recovery and isinstance(recovery[1], MappingNode):
            moved = moved.edited(insert(recovery[1], "max_restarts_on_errors", str(count)))
        else:
            new = flow({**known, "max_restarts_on_errors": count})
            moved = moved.edited(put_in(moved.text, "resources", "job_recovery", new))
    return moved.edited(drop(moved.text, compose(moved.text), "max_restarts_on_errors"))
