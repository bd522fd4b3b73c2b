"""From options to a managed job: render, check, look, submit. `launch_cli` strings the steps together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyspot.errors import SkyspotError, UnreadableError, UsageError
from skyspot.jobs import client
from skyspot.jobs import training as jobs
from skyspot.jobs.client import Job
from skyspot.lint import linter
from skyspot.lint.rules import Finding
from skyspot.migrate.source import task_yaml
from skyspot.runs import location
from skyspot.runs.location import Location, Progress
from skyspot.task import document, edits, payload
from skyspot.task.document import Task
from skyspot.task.options import WRITTEN, Options, written_task
from skyspot.task.render import headed
from skyspot.task.shell import options
from trainer.layout.names import RunPaths


@dataclass(frozen=True)
class Part:
    """One task of what is about to be submitted."""

    name: str
    task: Task
    where: Location | None
    """The folder of the run that it trains."""

    @property
    def makes_bucket(self) -> str | None:
        """The bucket that SkyPilot will make where there is none of that name."""
        return self.where.made if self.where else None


@dataclass(frozen=True)
class Launch:
    """What is about to be submitted."""

    name: str
    text: str
    path: Path
    """Where it is written: .skyspot/<run>.yaml."""
    trainers: tuple[str, ...]
    """The runs whose copies of the trainer lie beside it as its payload."""
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    linted: Path
    """The file whose lines the findings name."""
    secrets: Mapping[str, str]
    """Values of the task's secrets; in no file and no message."""
    parts: tuple[Part, ...]
    """Its tasks: one, or those of a pipeline."""
    is_group: bool = False
    """Whether the tasks of several run side by side."""

    @property
    def where(self) -> Location | None:
        """The run's folder, of one task alone."""
        return self.parts[0].where if len(self.parts) == 1 else None

    @property
    def makes_bucket(self) -> str | None:
        """The bucket that SkyPilot will make where there is none of that name, of one task alone."""
        return self.parts[0].makes_bucket if len(self.parts) == 1 else None

    def each(self, before: Before) -> list[tuple[Part, Before]]:
        """Each task, with what there is already of its run."""
        return list(zip(self.parts, before.parts or [before] * len(self.parts), strict=True))


@dataclass(frozen=True)
class Before:
    """What there is already under this run's name."""

    living: Job | None
    progress: Progress | None
    unread: str
    """Why the run's folder says nothing; empty where it does."""
    differs: str | None
    """The field of the binding configuration that differs, as a sentence."""
    unasked: str = ""
    """Why SkyPilot was not asked for a living job; empty where it was."""
    parts: tuple[Before, ...] = ()
    """Of a pipeline: the same of each task; beside them, `living` and `unasked` alone say something."""

    @property
    def resumes(self) -> bool:
        """Whether a run, or one of a pipeline's, was begun before."""
        return any(one.progress for one in self.parts or (self,))


def prepare(options: Options, folder: Path) -> Launch:
    """Render, or take the file that was edited by hand; lint it; find the secrets' values. Nothing is written yet.

    Raises:
        UsageError: a mistake in what was asked for; a secret without a value.
        SkyspotError: the file was edited by hand, and what is asked for now differs too (with the diff).
    """
    known = written_task(options.name, folder) if options.name else None
    said = options.flags if options.flags is not None else set(options.given()) - {"task"}
    if known and known.exists() and said <= {"name", "ignore"} and options.task == Options.task:
        # The run's name alone: go on with what was written for it.
        rendered = task_yaml(Options(task=str(known), name=options.name, secret=options.secret))
        text, notes = edits.read(known), (f"Using {known}", *rendered.notes)
        name, path, linted = rendered.name, known, known
        found = linter.findings(text, ignored=options.ignore)
    else:
        rendered = task_yaml(options)
        name = rendered.name
        path = written_task(name, folder)
        linted = Path(options.task) if rendered.before is not None else path
        found = linter.findings_in(rendered.before or rendered.text, rendered.text, options.ignore)
        if not (path.exists() and rendered.before is not None and path.samefile(options.task)):
            rendered = headed(rendered, Path(options.task))
        text, more = payload.chosen(rendered, path, Path(options.task))
        if text != rendered.text:
            found, linted = linter.findings(text, ignored=options.ignore), path
        notes = (*rendered.notes, *more)
    file = document.read(text)
    return Launch(
        name=name,
        text=text,
        path=path,
        trainers=payload.trainers(text),
        notes=notes,
        findings=tuple(found),
        linted=linted,
        secrets=_secret_values(file.tasks, options.secret),
        parts=tuple(
            Part(called, one, location.location(one)) for called, one in zip(file.names(name), file.tasks, strict=True)
        ),
        is_group=file.is_group,
    )


def _secret_values(tasks: Sequence[Task], given: Mapping[str, str | None]) -> dict[str, str]:
    """The value of each secret: given, or the variable of that name here."""
    found: dict[str, str] = {}
    # Those that the YAML itself carries need no other value.
    names = [name for one in tasks for name, written in one.secrets.items() if written is None]
    for name in dict.fromkeys([*names, *given]):
        value = given.get(name)
        value = value if value is not None else os.environ.get(name)
        if value is None:
            raise UsageError(f"secret {name} has no value: --secret {name}=..., or set a variable of that name")
        found[name] = value
    return found


def check(launch: Launch) -> list[str]:
    """Have SkyPilot's own code read and validate the task; returns what could not be checked here.

    Raises:
        SkyspotError: SkyPilot refuses it.
    """
    made = [f"{WRITTEN}/{run}/trainer" for run in launch.trainers]
    return client.check(launch.text, launch.secrets, made)


def look_before(launch: Launch, *, dryrun: bool = False) -> Before:
    """What SkyPilot and the run's folder say of this name already.

    Args:
        launch: What is about to be submitted.
        dryrun: Nothing will be: that SkyPilot cannot be asked is no error then.

    Raises:
        SkyspotError: SkyPilot cannot be asked.
    """
    living, unasked = None, ""
    try:
        jobs = client.queue(living=True, start=not dryrun)
        living = next((job for job in jobs if job.name == launch.name), None)
    except SkyspotError as error:
        if not dryrun:
            raise
        unasked = str(error)
    found = [_look(part, living if len(launch.parts) == 1 else None, unasked) for part in launch.parts]
    before = found[0] if len(found) == 1 else Before(living, None, "", None, parts=tuple(found))
    return replace(before, unasked=unasked)


def _look(part: Part, living: Job | None, unasked: str) -> Before:
    """What there is already of one task's run; SkyPilot is not asked again where it cannot be."""
    if part.where is None:
        return Before(living, None, "the task names no SKYSPOT_CHECKPOINT_DIR", None)
    try:
        paths = location.open_run(part.where if unasked else jobs.resolved(part.where))
        progress = location.progress(paths)
        return Before(living, progress, "", _difference(part.task, paths) if progress else None)
    except UnreadableError as error:
        return Before(living, None, str(error), None)


def _difference(task: Task, paths: RunPaths) -> str | None:
    """The first field that binds the run and is asked for with another value now.

    The trainer compares all that binds a run when it starts; this sees what stands in the task's envs, before a
    machine is paid for.
    """
    bound = location.binding(paths)
    allowed = {
        word.text
        for command in task.run.commands
        if command.program not in ("echo", "printf")
        for word in options(command, "--allow-config-change")
    }
    for field, value in sorted(bound.items()):
        asked = task.envs.get(f"SKYSPOT_{field.upper()}")
        if asked is None or field in allowed or _same(value, asked):
            continue
        return f"{field} is {value!r} in the run and {asked!r} here"
    return None


def _same(value: Any, text: str) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(text) == float(value)
        except ValueError:
            return False
    return value is None or text == str(value)


def refuse_errors(launch: Launch) -> None:
    """Stop where lint found an error.

    Raises:
        SkyspotError: it did.
    """
    errors = [finding for finding in launch.findings if finding.level == "error"]
    if errors:
        said = "\n".join(linter.shown(finding, launch.linted) for finding in errors)
        codes = " ".join(f"--ignore {code}" for code in dict.fromkeys(finding.name for finding in errors))
        how = "" if linter.refused(errors) else f"\nTo submit it anyway: {codes}"
        raise SkyspotError(f"this task is not submitted:\n{said}{how}")


def refuse(launch: Launch, before: Before, replace: bool) -> None:
    """Stop where submitting would do harm to what is there already.

    Raises:
        SkyspotError: a job of that name lives, or the run was begun with another configuration.
    """
    for part, one in launch.each(before):
        if one.differs:
            remedy = "Give it another name (-n)" if not before.parts else f"Give task {part.name} another folder"
            raise SkyspotError(
                f"run {part.where if before.parts else launch.name} was begun with another configuration: "
                f"{one.differs}. {remedy}, or change the run on purpose: --allow-config-change "
                f"{one.differs.split()[0]} in the trainer's command"
            )
    if before.living and not replace:
        job = before.living
        raise SkyspotError(
            f"a job called {launch.name} is alive: id {job.id}, {job.status}. Look at it with `skyspot logs "
            f"{launch.name}`; --replace lets it save and takes its place"
        )


def write(launch: Launch, update_trainer: bool) -> None:
    """Write .skyspot/<run>.yaml and the trainer's copy beside it."""
    payload.place(launch.path, launch.text, launch.trainers, update_trainer)
