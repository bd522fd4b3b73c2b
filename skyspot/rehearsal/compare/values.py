"""Comparing values as JSON has them: objects, lists, numbers, texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from skyspot.rehearsal.compare.difference import MISSING, Difference, excerpts
from skyspot.rehearsal.compare.rules import Comparison, Findings, Key, dotted, is_close


def compare_values(
    left: Any, right: Any, path: Sequence[Key], rules: Comparison, findings: Findings
) -> Difference | None:
    """Find the first difference between two values at a path."""
    if isinstance(left, dict) and isinstance(right, dict):
        return _compare_objects(left, right, path, rules, findings)
    if isinstance(left, list) and isinstance(right, list):
        for number, (one, two) in enumerate(zip(left, right, strict=False)):
            found = compare_values(one, two, [*path, number], rules, findings)
            if found:
                return found
        if len(left) == len(right):
            return None
        at = min(len(left), len(right))
        one, two = (_shown(items[at]) if len(items) > at else MISSING for items in (left, right))
        return Difference(_named([*path, at]), one, two, f"{len(left)} and {len(right)} items")
    if _is_number(left) and _is_number(right):
        if not is_close(left, right, rules.tolerance):
            return Difference(_named(path), *excerpts(_dumped(left), _dumped(right), quoted=False))
        if left != right and left == left:
            findings.record(abs(left - right), dotted(path) or "the file")
        return None
    if type(left) is type(right) and left == right:
        return None
    return Difference(_named(path), *excerpts(_dumped(left), _dumped(right), quoted=False))


def _compare_objects(
    left: dict[str, Any], right: dict[str, Any], path: Sequence[Key], rules: Comparison, findings: Findings
) -> Difference | None:
    for key in [*left, *(key for key in right if key not in left)]:
        here = [*path, key]
        if findings.ignores(here, rules):
            continue
        if key not in left:
            return Difference(_named(here), MISSING, _shown(right[key]))
        if key not in right:
            return Difference(_named(here), _shown(left[key]), MISSING)
        found = compare_values(left[key], right[key], here, rules, findings)
        if found:
            return found
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _named(path: Sequence[Key]) -> str:
    return f"key {dotted(path)}" if path else "its value"


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)


def _shown(value: Any) -> str:
    return excerpts(_dumped(value), "", quoted=False)[0]
