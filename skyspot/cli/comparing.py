"""The options of `skyspot rehearse` that say which results are equal."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from skyspot.errors import UsageError, shown
from skyspot.rehearsal.compare import command
from skyspot.rehearsal.compare.rules import Comparison, Pattern
from skyspot.rehearsal.task import RehearsalTask
from skyspot.task.mounts import innermost

_OPTIONS: list[Any] = [
    click.option(
        "--compare",
        "globs",
        multiple=True,
        metavar="GLOB",
        help="Result files in the bucket to compare byte for byte. Repeatable.",
    ),
    click.option(
        "--tolerance",
        type=float,
        metavar="T",
        help="Floats a and b in JSON, CSV and tensor files are equal if |a - b| <= T + T * |b|, with b from the "
        "undisturbed run (numpy.isclose with rtol and atol T). Integers must be equal.",
    ),
    click.option(
        "--ignore-key",
        "ignored",
        multiple=True,
        metavar="A,B",
        help="JSON keys at any depth, CSV columns, or tensors that may differ. Repeatable.",
    ),
    click.option(
        "--compare-with",
        "command",
        metavar="COMMAND",
        help="Shell command that compares instead: two paths (undisturbed, preempted) are added to it; exit 0: equal.",
    ),
    click.option(
        "--assume-reproducible",
        is_flag=True,
        help="If results differ, do not run the task undisturbed again to see if it differs by itself.",
    ),
]


def comparing_options(run: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a comparison; the command gets them as one `comparison`, and `assume_reproducible`."""

    @functools.wraps(run)
    def with_options(**flags: Any) -> Any:
        given = [flags.pop(name) for name in ("globs", "tolerance", "ignored", "command")]
        return run(comparison=_comparison(*given), **flags)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options


def _comparison(
    globs: tuple[str, ...], tolerance: float | None, ignored: tuple[str, ...], with_command: str | None
) -> Comparison:
    """The comparison that the options ask for. Its patterns are as they were given.

    Raises:
        UsageError: an option is invalid, or useless without another one.
    """
    keys = tuple(key.strip() for text in ignored for key in text.split(",") if key.strip())
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"--tolerance: must be a number from 0, not {tolerance:g}")
    if ignored and not keys:
        raise UsageError("--ignore-key: name at least one key, like elapsed,time")
    if with_command is not None:
        command.check(with_command)
    by_value = "--tolerance" if tolerance is not None else "--ignore-key" if keys else None
    if by_value and with_command is not None:
        raise UsageError(f"--compare-with: the command alone compares; remove {by_value}")
    if by_value and not globs:
        raise UsageError(f"{by_value}: name the result files as well: --compare 'GLOB'")
    return Comparison(tuple(map(Pattern, globs)), tolerance, keys, with_command)


def located(task: RehearsalTask, comparison: Comparison) -> tuple[RehearsalTask, Comparison]:
    """The task and the comparison with each pattern in its bucket: relative to the run's, or from a mount point on.

    Raises:
        UsageError: a pattern is none, or lies in none of the task's buckets.
    """
    patterns = tuple(_located(task, pattern.glob) for pattern in comparison.patterns)
    named = [pattern.mount for pattern in patterns if pattern.mount]
    if named:
        task = dataclasses.replace(task, compared_in=named[0])
    if len(task.lasting) > 1 and task.bucket and len(named) < max(1, len(patterns)):
        target, other = task.bucket.path, next(one for one in task.lasting if one != task.bucket).path
        note = ""
        if patterns:
            note = f"--compare looks in {target}; a pattern like {other}/... looks in another bucket."
        elif not task.names_bucket:
            note = f"assuming that the run is in the bucket at {target}."
        task = dataclasses.replace(task, notes=(*task.notes, note) if note else task.notes)
    return task, dataclasses.replace(comparison, patterns=patterns)


def _located(task: RehearsalTask, glob: str) -> Pattern:
    absolute = glob.startswith(("/", "~/"))
    mount = innermost(task.lasting, glob) if absolute else None
    if absolute and not mount:
        raise UsageError(f"--compare: {shown(glob)} is in none of the task's buckets")
    inside = glob[len(mount.path) :].strip("/") or "*" if mount else glob
    if not _is_pattern(inside):
        raise UsageError(f"--compare: {shown(inside)} is not a pattern of files in the bucket, like 'results/*.json'")
    return Pattern(inside, mount.path if mount else None)


def _is_pattern(pattern: str) -> bool:
    if not pattern or ".." in Path(pattern).parts:
        return False
    try:
        next(Path(os.devnull).glob(pattern), None)
    except (ValueError, NotImplementedError, IndexError):
        return False
    return True
