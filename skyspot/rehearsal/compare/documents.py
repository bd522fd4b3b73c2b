"""Comparing JSON documents and JSON lines."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

from skyspot.rehearsal.compare.difference import MISSING, Difference, excerpts
from skyspot.rehearsal.compare.rules import Comparison, Findings, FormatError
from skyspot.rehearsal.compare.values import compare_values

LARGEST = 50_000_000
"""A JSON document of more bytes is not read: its values would take several times its size in memory."""


def compare_json(left: Path, right: Path, rules: Comparison, findings: Findings) -> Difference | None:
    """Compare two JSON documents, or two files of JSON lines named .json.

    Raises:
        FormatError: a file is no JSON, or too large.
    """
    for path in (left, right):
        if path.stat().st_size > LARGEST:
            raise FormatError(f"larger than {LARGEST // 1_000_000} MB")
    try:
        documents = [_parsed(path.read_bytes()) for path in (left, right)]
    except FormatError:
        return compare_json_lines(left, right, rules, findings)
    return compare_values(documents[0], documents[1], (), rules, findings)


def compare_json_lines(left: Path, right: Path, rules: Comparison, findings: Findings) -> Difference | None:
    """Compare two files of JSON lines, line by line.

    Raises:
        FormatError: a line is no JSON.
    """
    with left.open("rb") as one, right.open("rb") as two:
        for number, (before, after) in enumerate(zip_longest(one, two), 1):
            if before is None or after is None:
                shown = [MISSING if line is None else excerpts(line.decode(errors="replace"), "")[0]
                         for line in (before, after)]  # fmt: skip
                return Difference(f"line {number}", *shown)
            if before.rstrip(b"\r\n") == after.rstrip(b"\r\n"):
                continue
            found = compare_values(_parsed(before), _parsed(after), (), rules, findings)
            if found:
                return Difference(f"line {number}, {found.what}", found.left, found.right, found.more)
    return None


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError("no JSON") from None
