"""Shell completion of arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from click import Context, Parameter

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def complete_task(_ctx: Context, _parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of templates, and files."""
    from skyspot.task import template

    return _with_paths([name for name in template.names() if name.startswith(incomplete)], incomplete, "file")


def complete_run(_ctx: Context, _parameter: Parameter, incomplete: str) -> list[str]:
    """Names of runs whose task YAML is in this project."""
    return sorted(path.stem for path in Path(".skyspot").glob("*.yaml") if path.stem.startswith(incomplete))


def complete_run_or_folder(ctx: Context, parameter: Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of runs, and folders."""
    return _with_paths(complete_run(ctx, parameter, incomplete), incomplete, "dir")


def complete_gpus(_ctx: Context, _parameter: Parameter, incomplete: str) -> list[str]:
    """Names of accelerators, after the last comma."""
    from skyspot.task.gpus import NAMES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}:" for name in NAMES if name.lower().startswith(last.lower())]


def complete_rule(_ctx: Context, _parameter: Parameter, incomplete: str) -> list[str]:
    """Codes of lint rules."""
    from skyspot.lint.rules import CODES

    return [code for code in CODES if code.startswith(incomplete)]


def _with_paths(names: list[str], incomplete: str, kind: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem  # Only a shell needs it.

    found = [CompletionItem(name) for name in names]
    return [*found, CompletionItem(incomplete, type=kind)] if incomplete or not found else found
