"""Migration of rungs, so that SkyPilot can launch them: one place for each rung, one job_recovery for all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from skyspot.errors import UsageError, shown
from skyspot.task import document
from skyspot.task.emitter import flow, quoted
from skyspot.task.ladder import RECOVER
from skyspot.task.nodes import Entry, MappingNode, Node, SequenceNode, at, compose, entries, entry, merged, value
from skyspot.task.sheet import Sheet, append, drop, insert, put, put_in, rename

_PLACE = ("cloud", "region", "zone")
_BARE_PLACE = re.compile(r"[A-Za-z][A-Za-z0-9._/@*-]*")
_BARE_WORD = re.compile(r"[A-Za-z_]+")


def _resources(root: MappingNode) -> tuple[MappingNode, list[MappingNode]] | None:
    """Find `resources` and the entries of its `ordered` or `any_of`."""
    found = entry(root, "resources")
    if not found or not isinstance(found[1], MappingNode):
        return None
    lists = [node for name in ("ordered", "any_of") for _, (_, node) in at(found[1], name)]
    items = [item for node in lists if isinstance(node, SequenceNode) for item in node.value]
    return found[1], [item for item in items if isinstance(item, MappingNode)]


# -- places ------------------------------------------------------------------------------------------------------------


def one_place(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """Merge `infra` with `cloud`, `region` and `zone`, in a rung or above it, into one `infra`."""
    found = _resources(root)
    if not found:
        return None
    top, rungs = entries(found[0]), found[1]
    if not any(_mixed(resources) for resources in (top, *({**top, **entries(rung)} for rung in rungs))):
        return None
    for mapping in (mapping for node in (found[0], *rungs) for mapping in merged(node)):
        old = {name: known for name in _PLACE if (known := entry(mapping, name)) and value(known[1]) is not None}
        if old:
            return _placed(sheet, mapping, old, {**top, **entries(mapping)}.get("infra"))
    return None


def _mixed(resources: Mapping[str, Any]) -> bool:
    return resources.get("infra") is not None and any(resources.get(name) is not None for name in _PLACE)


def _placed(sheet: Sheet, mapping: MappingNode, old: dict[str, Entry], infra: Any) -> Sheet:
    """Move one of a mapping's `cloud`, `region` and `zone` into `infra`, given the `infra` in effect there."""
    place = {name: str(value(found[1])) for name, found in old.items()}
    own, known = entry(mapping, "infra"), _parts(infra)
    first, found = next(iter(old.items()))
    if not own or value(own[1]) is None:
        whole = _joined(_over(known, place), sheet.line(found[0]))
        sheet = sheet.noted(
            found[0], f"{first}: {place[first]} -> infra: {whole}; SkyPilot accepts only one of the two spellings"
        )
        if own:
            return sheet.edited(put(sheet.text, own, _written(whole)))
        # The value comes after its key, so the key's position stays valid.
        sheet = sheet.edited(put(sheet.text, found, _written(whole)))
        return sheet.edited(rename(sheet.text, found[0], "infra"))
    for name, other in old.items():
        if name in known and not _same(name, place[name], known[name]):
            raise UsageError(
                f"line {sheet.line(other[0])}: {name}: {shown(place[name])} contradicts infra: {shown(str(infra))} on "
                f"line {sheet.line(own[0])}. Keep only one of them, as infra"
            )
    missing = [name for name in old if name not in known]
    if missing:
        whole = _joined({**place, **known}, sheet.line(own[0]))
        sheet = sheet.noted(own[0], f"infra: {infra} -> {whole}, including the {' and the '.join(missing)}")
        return sheet.edited(put(sheet.text, own, _written(whole)))
    sheet = sheet.noted(
        found[0], f"removed {first}: infra contains it, and SkyPilot accepts only one of the two spellings"
    )
    return sheet.edited(drop(sheet.text, mapping, first))


def _over(known: dict[str, str], place: dict[str, str]) -> dict[str, str]:
    """Override a place with a rung's own; where they differ, the narrower parts of the former are dropped."""
    for index, name in enumerate(_PLACE):
        if name in place and not _same(name, place[name], known.get(name, place[name])):
            known = {above: known[above] for above in _PLACE[:index] if above in known}
        if name in place:
            known = {name: place[name], **known}
    return known


def _parts(infra: Any) -> dict[str, str]:
    """Split cloud[/region[/zone]] by name. A Kubernetes context may contain slashes; `*` means any."""
    words = [] if infra is None else [word.strip() for word in str(infra).strip().strip("/").split("/")]
    if words and words[0].lower() in ("k8s", "kubernetes", "ssh"):
        words = [words[0], *filter(None, ["/".join(words[1:])])]
    elif len(words) > 3:
        words = [*words[:2], "/".join(words[2:])]
    return {name: word for name, word in zip(_PLACE, words, strict=False) if word not in ("*", "")}


def _joined(parts: Mapping[str, str], line: int) -> str:
    words = [parts.get(name, "*") for name in _PLACE]
    while words[-1] == "*":
        words.pop()
    whole = "/".join(words)
    if _parts(whole) != dict(parts):
        place = ", ".join(f"{name}: {shown(parts[name])}" for name in _PLACE if name in parts)
        raise UsageError(f"line {line}: {place} cannot be written as infra. Write it by hand: cloud[/region[/zone]]")
    return whole


def _written(infra: str) -> str:
    return infra if _BARE_PLACE.fullmatch(infra) else quoted(infra)


def _same(name: str, one: str, other: str) -> bool:
    if name != "cloud":
        return one == other
    return one.lower().replace("kubernetes", "k8s") == other.lower().replace("kubernetes", "k8s")


# -- recovery ----------------------------------------------------------------------------------------------------------


def recovery(stated: Any) -> dict[str, Any]:
    """Normalize job_recovery as SkyPilot does at a launch: a mapping with a strategy."""
    found = dict(stated) if isinstance(stated, Mapping) else {"strategy": stated}
    strategy = found.get("strategy")
    if strategy == "none":  # SkyPilot then ignores the rest.
        return {"strategy": "EAGER_NEXT_REGION"}
    return {**found, "strategy": str(strategy or "eager_next_region").upper()}


def one_recovery(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """Keep one job_recovery, at the top of `resources`: if rungs differ in it, SkyPilot's launch fails."""
    found = _resources(root)
    if not found or not found[1]:
        return None
    top, rungs = entries(found[0]), found[1]
    stated = _stated(rungs)
    meant = [recovery({**top, **entries(rung)}.get("job_recovery")) for rung in rungs]
    if not stated or (all(one == meant[0] for one in meant) and not _lacks_75(sheet)):
        return None
    first = bool(_stated(rungs[:1]))
    chosen = stated[0][1] if first or not top.get("job_recovery") else None
    if chosen:
        which = "the first rung's" if first else "this rung's"
        change = f"moved {which} job_recovery to the top of resources: SkyPilot requires one for all rungs"
        sheet = sheet.noted(chosen[0], change)
        sheet = sheet.edited(put_in(sheet.text, "resources", "job_recovery", _inline(chosen[1])))
    silent = chosen is not None
    while stated := _stated(_rungs(sheet)):
        mapping, (key, node) = stated[0]
        if not silent:
            what = f"removed job_recovery: {flow(value(node))} of a rung"
            sheet = sheet.noted(key, f"{what}; the one at the top of resources applies to all rungs")
        silent = False
        sheet = sheet.edited(drop(sheet.text, mapping, "job_recovery"))
    return sheet


def _rungs(sheet: Sheet) -> list[MappingNode]:
    found = _resources(compose(sheet.text))
    return found[1] if found else []


def _stated(rungs: list[MappingNode]) -> list[tuple[MappingNode, Entry]]:
    return [found for rung in rungs for found in at(rung, "job_recovery")]


def _inline(node: Node) -> str:
    return str(node.value) if isinstance(node.value, str) and _BARE_WORD.fullmatch(node.value) else flow(value(node))


def _lacks_75(sheet: Sheet) -> bool:
    """True if our trainer runs, which exits with 75 to be restarted, and a rung does not list 75."""
    return any(
        task.trainer and any(RECOVER not in [code for code, _ in rung.recover_on] for rung in task.rungs)
        for task in document.tasks(sheet.text)
    )


def _codes(stated: Mapping[str, Any]) -> list[Any]:
    found = stated.get("recover_on_exit_codes")
    return found if isinstance(found, list) else [] if found is None else [found]


def recover_on_75(sheet: Sheet, root: MappingNode) -> Sheet | None:
    """Add 75 to the codes that SkyPilot recovers on if our trainer runs; another program could loop forever."""
    if not _lacks_75(sheet):
        return None
    found = entry(root, "resources")
    recover = entry(found[1], "job_recovery") if found else None
    where = recover or found or entry(root, "run")
    assert where
    noted = sheet.noted(
        where[0], f"added {RECOVER} to recover_on_exit_codes: the trainer in `run` exits with it to be restarted"
    )
    stated = entries(found[1]).get("job_recovery") if found else None
    if not recover or not isinstance(recover[1], MappingNode):
        kept = {} if stated in (None, "none") else recovery(stated)
        new = flow({**kept, "recover_on_exit_codes": [*_codes(kept), RECOVER]})
        return noted.edited(put_in(noted.text, "resources", "job_recovery", new))
    if isinstance(stated, dict) and stated.get("strategy") == "none":
        strategy = entry(recover[1], "strategy")
        default = recovery(None)["strategy"]
        return sheet.edited(put(sheet.text, strategy, default) if strategy else insert(recover[1], "strategy", default))
    listed = entry(recover[1], "recover_on_exit_codes")
    if not listed:
        return noted.edited(insert(recover[1], "recover_on_exit_codes", f"[{RECOVER}]"))
    whole = put(noted.text, listed, flow([*_codes(entries(recover[1])), RECOVER]))
    return noted.edited(append(noted.text, listed, str(RECOVER)) or whole)
