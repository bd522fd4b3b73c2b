"""The linter finds in a task YAML what SkyPilot accepts but a run would suffer from. No network, no SkyPilot."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace

from skyspot.errors import NotYamlError
from skyspot.errors import shown as shown_value
from skyspot.lint import ignore, keys, mounts, programs, resources
from skyspot.lint.rules import Finding
from skyspot.task import document, sheet
from skyspot.task.document import Task
from skyspot.task.shell import Command, option

_SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_|$)")
_SECRET_END = re.compile(r"(?:APIKEY|TOKEN|SECRET|PASSWORD|PASSWD)$")
_NO_SECRET = re.compile(r"\s*|[\d.+-]+|true|false|yes|no|none|null|\$.*|<.*>", re.IGNORECASE | re.DOTALL)
# Shell keywords that fail only if a command in their block fails.
_SYNTAX = ("fi", "done", "esac", "}", "else", "then", "do")


def findings(text: str, *, grace_s: float | None = None, ignored: Collection[str] = ()) -> list[Finding]:
    """Find all errors and warnings in a task YAML, by line.

    Args:
        text: The file's text; it may be invalid, or have several documents.
        grace_s: The time for the run's last save, if the caller knows it; else the task's own setting is used.
        ignored: Codes of rules whose findings become notes, in addition to those named by comments in the file.
    """
    try:
        tasks = [task for task in document.read(text).tasks if task.root.is_mapping]
    except NotYamlError as error:
        reason = f"this cannot be parsed as YAML: {' '.join(error.problem.split())[:120]}"
        return [Finding(error.line, "error", "not-yaml", reason, "Check this line and the one above")]
    if all(keys.what_it_is(task.root) for task in tasks):
        tasks = tasks[:1]  # One finding is enough for a file of many manifests.
    found = dict.fromkeys(
        replace(finding, task=_called(task, number) if len(tasks) > 1 else "")
        for number, task in enumerate(tasks, 1)
        for finding in _findings(task, grace_s)
    )
    left = ignore.overruled(text, list(found), ignored)
    return sorted(left, key=lambda finding: (finding.line, finding.level, finding.name))


def findings_in(before: str, after: str, ignored: Collection[str] = ()) -> list[Finding]:
    """Find errors and warnings in a migrated task YAML, with the line numbers of the original file."""
    lines = sheet.lines_before(before, after)
    found = [replace(finding, line=lines[finding.line - 1]) for finding in findings(after, ignored=ignored)]
    return sorted(found, key=lambda finding: finding.line)


def refused(found: Collection[Finding]) -> list[Finding]:
    """Select the findings for which SkyPilot refuses to read the file."""
    return [finding for finding in found if finding.level == "error" and finding.name in ("unknown-key", "not-a-task")]


def of_the_file(found: Collection[Finding]) -> list[Finding]:
    """Select the findings about the kind of file, not about what its run would suffer from."""
    about = ("unknown-key", "not-a-task", "service-section", "unknown-ignore")
    return [finding for finding in found if finding.name in about]


def shown(finding: Finding, path: object) -> str:
    """Format a finding in two lines: place, reason and rule, then the remedy. A note takes one line."""
    of = f"task {finding.task}: " if finding.task else ""
    line = f"{path}:{finding.line}: {finding.level}: {of}{finding.reason}"
    if finding.level == "note":
        return f"{line} (ignored). [{finding.name}]"
    end = "" if finding.remedy.endswith("?") else "."
    return f"{line}. [{finding.name}]\n  {finding.remedy}{end}"


def _called(task: Task, number: int) -> str:
    return shown_value(task.name).strip("'") if task.name else str(number)


def _findings(task: Task, grace_s: float | None) -> Iterator[Finding]:
    yield from keys.findings(task)
    if not keys.is_job(task):
        return
    yield from mounts.findings(task)
    yield from resources.findings(task, (grace_s, None) if grace_s is not None else _grace(task))
    yield from programs.findings(task)
    yield from _secrets(task)
    yield from _setup(task)
    yield from _uploads(task)


def _grace(task: Task) -> tuple[float, int | None] | None:
    """Read the grace that the task gives our trainer, and its line; None without one: the trainer's own always fits."""
    if not task.trainer:
        return None
    grace = option(task.trainer, "--grace")
    settings = [(entry.text, entry.line) for key, entry in task.env_entries.items() if key.startswith("SKYSPOT_GRACE")]
    if grace:
        settings.insert(0, (grace.text, task.run.line(grace)))
    for text, line in settings:
        try:
            seconds = float(text)
        except ValueError:
            continue
        if math.isfinite(seconds):
            return seconds, line
    return None


def _secrets(task: Task) -> Iterator[Finding]:
    for key, value in task.env_entries.items():
        name = key.upper()
        if (_SECRET.search(name) or _SECRET_END.search(name)) and not _NO_SECRET.fullmatch(value.text):
            # SkyPilot shows envs in its database, dashboard and logs; `redact_secrets` does not redact them.
            yield Finding(
                value.line,
                "warning",
                "secret-in-envs",
                f"{shown_value(key)} looks like a secret, but everyone who can see the job can read its envs",
                "Move it to `secrets` without a value, and pass the value with --secret KEY=VALUE",
            )


def _setup(task: Task) -> Iterator[Finding]:
    at = task.setup.at
    steps = [command for command in task.setup.commands if command.depth == 0]
    # Commands joined by `&&`, `||` or `|` succeed or fail as one.
    ends = [at for at, command in enumerate(steps) if command.ends not in ("&&", "||", "|")]
    several = sum(steps[end].words[0].text not in _SYNTAX for end in ends) > 1
    if at and several and not any(map(_stops_at_errors, steps)):
        yield Finding(
            at.line,
            "warning",
            "setup-without-set-e",
            "`setup` continues after a failed command, so `run` starts on a machine that is only half set up",
            "Start it with `set -e`",
        )


def _stops_at_errors(command: Command) -> bool:
    texts = [word.text for word in command.words]
    return texts[0] == "set" and any(re.fullmatch(r"-[a-zA-Z]*e[a-zA-Z]*|errexit", text) for text in texts[1:])


def _uploads(task: Task) -> Iterator[Finding]:
    """Find an `exec` in `run` that replaces the shell that waits for MOUNT_CACHED's uploads."""
    # The wait is appended to the script that holds `run`: build_task_bash_script(), sky/backends/task_codegen.py.
    cached = [mount for mount in task.mounts if mount.mode == "MOUNT_CACHED" and not mount.read_only]
    for command in task.run.commands if cached else ():
        # `exec >log` alone replaces nothing.
        program = command.words[1].text if len(command.words) > 1 else ""
        if command.words[0].text == "exec" and command.depth == 0 and program and not re.match(r"\d*[<>&]", program):
            yield Finding(
                task.run.line(command.words[0]),
                "warning",
                "exec-skips-uploads",
                f"SkyPilot waits at the end of `run` until {shown_value(cached[0].path)} is uploaded, but `exec` "
                "replaces the shell that waits: the last files are lost with the machine",
                "Remove `exec`, or use mode: MOUNT",
            )
