"""What SkyPilot accepts now and a run regrets later, found in a task YAML's text: no network, no SkyPilot."""

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

DEFAULT_GRACE_S = 25.0
_SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_|$)")
_SECRET_END = re.compile(r"(?:APIKEY|TOKEN|SECRET|PASSWORD|PASSWD)$")
_NO_SECRET = re.compile(r"\s*|[\d.+-]+|true|false|yes|no|none|null|\$.*|<.*>", re.IGNORECASE | re.DOTALL)
# Words of the shell that fail by themselves only where what they hold fails.
_SYNTAX = ("fi", "done", "esac", "}", "else", "then", "do")


def findings(text: str, *, grace_s: float | None = None, ignored: Collection[str] = ()) -> list[Finding]:
    """All that is wrong or doubtful in a task YAML, by line.

    Args:
        text: The file's text; anything at all, several documents too.
        grace_s: Seconds that the run is given for its last save, where the caller knows; else what the task says.
        ignored: Codes of rules whose findings are notes, beside those that comments in the file name.
    """
    try:
        tasks = [task for task in document.read(text).tasks if task.root.is_mapping]
    except NotYamlError as error:
        reason = f"this is not readable as YAML: {' '.join(error.problem.split())[:120]}"
        return [Finding(error.line, "error", "not-yaml", reason, "Look at this line and the one before")]
    if all(keys.what_it_is(task.root) for task in tasks):
        tasks = tasks[:1]  # Of a file with many manifests, the first says it all.
    found = dict.fromkeys(
        replace(finding, task=_called(task, number) if len(tasks) > 1 else "")
        for number, task in enumerate(tasks, 1)
        for finding in _findings(task, grace_s)
    )
    left = ignore.overruled(text, list(found), ignored)
    return sorted(left, key=lambda finding: (finding.line, finding.level, finding.name))


def findings_in(before: str, after: str, ignored: Collection[str] = ()) -> list[Finding]:
    """What is wrong or doubtful in a task YAML after its migration, at the lines of the file as it was before."""
    lines = sheet.lines_before(before, after)
    found = [replace(finding, line=lines[finding.line - 1]) for finding in findings(after, ignored=ignored)]
    return sorted(found, key=lambda finding: finding.line)


def refused(found: Collection[Finding]) -> list[Finding]:
    """Of findings, those for which SkyPilot refuses to read the file."""
    return [finding for finding in found if finding.level == "error" and finding.name in ("unknown-key", "not-a-task")]


def of_the_file(found: Collection[Finding]) -> list[Finding]:
    """Of findings, those about what the file is, not about what a run of it regrets."""
    about = ("unknown-key", "not-a-task", "service-section", "unknown-ignore")
    return [finding for finding in found if finding.name in about]


def shown(finding: Finding, path: object) -> str:
    """A finding in two lines: where, what and by which rule, then the remedy; one that is overruled in one."""
    of = f"task {finding.task}: " if finding.task else ""
    said = f"{path}:{finding.line}: {finding.level}: {of}{finding.reason}"
    if finding.level == "note":
        return f"{said} (ignored). [{finding.name}]"
    end = "" if finding.remedy.endswith("?") else "."
    return f"{said}. [{finding.name}]\n  {finding.remedy}{end}"


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
    """The grace that the task gives our trainer, and the line that says so; None where the trainer does not run."""
    if not task.trainer:
        return None
    asked = option(task.trainer, "--grace")
    said = [(entry.text, entry.line) for key, entry in task.env_entries.items() if key.startswith("SKYSPOT_GRACE")]
    if asked:
        said.insert(0, (asked.text, task.run.line(asked)))
    for text, line in said:
        try:
            seconds = float(text)
        except ValueError:
            continue
        if math.isfinite(seconds):
            return seconds, line
    return DEFAULT_GRACE_S, None


def _secrets(task: Task) -> Iterator[Finding]:
    for key, value in task.env_entries.items():
        name = key.upper()
        if (_SECRET.search(name) or _SECRET_END.search(name)) and not _NO_SECRET.fullmatch(value.text):
            # envs stand in the clear in SkyPilot's database, dashboard and logs (`redact_secrets` leaves them).
            yield Finding(
                value.line,
                "warning",
                "secret-in-envs",
                f"{shown_value(key)} looks like a secret, and envs are shown to all who see the job",
                "Move it to `secrets`, without a value, and give that with --secret KEY=VALUE",
            )


def _setup(task: Task) -> Iterator[Finding]:
    at = task.setup.at
    steps = [command for command in task.setup.commands if command.depth == 0]
    # What `&&`, `||` and `|` join stands or falls as one.
    ends = [at for at, command in enumerate(steps) if command.ends not in ("&&", "||", "|")]
    several = sum(steps[end].words[0].text not in _SYNTAX for end in ends) > 1
    if at and several and not any(map(_stops_at_errors, steps)):
        yield Finding(
            at.line,
            "warning",
            "setup-without-set-e",
            "`setup` goes on after a command that fails, and `run` then starts on a machine that is half set up",
            "Begin it with `set -e`",
        )


def _stops_at_errors(command: Command) -> bool:
    texts = [word.text for word in command.words]
    return texts[0] == "set" and any(re.fullmatch(r"-[a-zA-Z]*e[a-zA-Z]*|errexit", text) for text in texts[1:])


def _uploads(task: Task) -> Iterator[Finding]:
    """`exec` in `run` replaces the shell that would wait for MOUNT_CACHED's uploads."""
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
                f"SkyPilot waits at the end of `run` until {shown_value(cached[0].path)} is uploaded, and after "
                "`exec` there is no shell to wait: the last files are lost with the machine",
                "Take `exec` away, or use mode: MOUNT",
            )
