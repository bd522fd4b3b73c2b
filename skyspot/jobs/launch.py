"""The steps of a launch: prepare the task, check it, look at the existing run, refuse, write. The cli calls them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyspot.errors import SkyspotError, UnreadableError, UsageError
from skyspot.jobs import client
from skyspot.jobs.allowed import allowed
from skyspot.jobs.client import Job
from skyspot.jobs.training import resolved
from skyspot.lint import linter
from skyspot.lint.rules import Finding
from skyspot.migrate.source import task_yaml, written_for, written_text
from skyspot.money import travel
from skyspot.money.plan import TaskPlan
from skyspot.money.prices import CUT
from skyspot.runs import limits as records
from skyspot.runs import location
from skyspot.runs.location import Location
from skyspot.runs.progress import Progress, run_binding, run_progress
from skyspot.runs.speed import Speed, measured_speed
from skyspot.task import document, payload
from skyspot.task.document import Task
from skyspot.task.emitter import BOOLEANS
from skyspot.task.limits import DEADLINE, limits_of, shown_time
from skyspot.task.options import MAX_SPEND, WRITTEN, Options, secret_value, written_task
from skyspot.task.render import headed
from trainer.layout.events import number
from trainer.layout.names import RunPaths


@dataclass(frozen=True)
class Part:
    """One task of a launch."""

    name: str
    task: Task
    where: Location | None
    """The folder of the run that the task trains."""

    @property
    def makes_bucket(self) -> str | None:
        """The bucket that SkyPilot will create if it does not exist."""
        return self.where.made if self.where else None


@dataclass(frozen=True)
class Launch:
    """A job that is ready to be submitted."""

    name: str
    text: str
    path: Path
    """The file that it is written to: .skyspot/<run>.yaml."""
    trainers: tuple[str, ...]
    """The runs whose copies of the trainer are its payload."""
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    linted: Path
    """The file whose lines the findings name."""
    secrets: Mapping[str, str]
    """Values of the task's secrets; they stand in no file and no message."""
    parts: tuple[Part, ...]
    """Its tasks: one, or the tasks of a pipeline."""
    is_group: bool = False
    """True if several tasks run side by side."""

    @property
    def where(self) -> Location | None:
        """The run's folder; None for a pipeline."""
        return self.parts[0].where if len(self.parts) == 1 else None

    @property
    def makes_bucket(self) -> str | None:
        """The bucket that SkyPilot will create if it does not exist; None for a pipeline."""
        return self.parts[0].makes_bucket if len(self.parts) == 1 else None

    def each(self, existing: Existing) -> list[tuple[Part, Existing]]:
        """Each task with its existing run."""
        return list(zip(self.parts, existing.parts or [existing] * len(self.parts), strict=True))


@dataclass(frozen=True)
class Existing:
    """The job and the run that already have this name."""

    living: Job | None
    progress: Progress | None
    unread: str
    """The reason why the run's folder cannot be read; empty if it can."""
    differs: str | None
    """The first difference in the binding configuration, as a sentence."""
    unchecked: str = ""
    """The reason why SkyPilot was not asked for an active job; empty if it was."""
    parts: tuple[Existing, ...] = ()
    """The same for each task of a pipeline; the pipeline itself then has only `living` and `unchecked`."""
    speed: Speed | None = None
    """The measured speed of an unfinished run; None: unknown."""

    @property
    def resumes(self) -> bool:
        """True if the run, or one of a pipeline's runs, has already started."""
        return any(one.progress for one in self.parts or (self,))


def prepare(options: Options, folder: Path) -> Launch:
    """Render the task, or read the file that was edited by hand; lint it; find the secrets' values. Writes nothing.

    Raises:
        UsageError: an option or the task is wrong, or a secret has no value.
        SkyspotError: the file was edited by hand and the options changed too; the message has the diff.
    """
    if known := written_for(options, folder):
        rendered = task_yaml(Options(task=str(known), name=options.name, secret=options.secret))
        text, notes = written_text(known, options), (f"Using {known}", *rendered.notes)
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
            Part(title, one, location.of_task(one)) for title, one in zip(file.names(name), file.tasks, strict=True)
        ),
        is_group=file.is_group,
    )


def _secret_values(tasks: Sequence[Task], given: Mapping[str, str | None]) -> dict[str, str]:
    """The value of each secret: the given value, or the environment variable of that name."""
    found: dict[str, str] = {}
    # A secret whose value stands in the YAML needs no other value.
    names = [name for one in tasks for name, written in one.secrets.items() if written is None]
    for name in dict.fromkeys([*names, *given]):
        found[name] = secret_value(name, given.get(name))
    return found


def check(launch: Launch) -> list[str]:
    """Validate the task with SkyPilot's own code; returns what could not be checked on this machine.

    Raises:
        SkyspotError: SkyPilot refuses the task.
    """
    made = [f"{WRITTEN}/{run}/trainer" for run in launch.trainers]
    return client.check(launch.text, launch.secrets, made)


def find_existing(launch: Launch, *, dryrun: bool = False) -> Existing:
    """The active job and the run that already have this name.

    Args:
        launch: The job that is ready to be submitted.
        dryrun: Whether an unreachable SkyPilot is no error, because nothing will be submitted.

    Raises:
        SkyspotError: SkyPilot cannot be reached.
    """
    living, unchecked = None, ""
    try:
        jobs = client.queue(living=True, start=not dryrun)
        living = next((job for job in jobs if job.name == launch.name), None)
    except SkyspotError as error:
        if not dryrun:
            raise
        unchecked = str(error)
    found = [_existing(part, living if len(launch.parts) == 1 else None, unchecked) for part in launch.parts]
    existing = found[0] if len(found) == 1 else Existing(living, None, "", None, parts=tuple(found))
    return replace(existing, unchecked=unchecked)


def _existing(part: Part, living: Job | None, unchecked: str) -> Existing:
    """The existing run of one task; SkyPilot is not asked again if it was unreachable."""
    if part.where is None:
        return Existing(living, None, "the task sets no SKYSPOT_CHECKPOINT_DIR", None)
    try:
        paths = location.open_run(part.where if unchecked else resolved(part.where))
        progress = run_progress(paths)
        speed = None
        if progress and not progress.finished:
            with suppress(UnreadableError):  # Nothing depends on it.
                speed = measured_speed(paths)
        return Existing(living, progress, "", _difference(part.task, paths) if progress else None, speed=speed)
    except UnreadableError as error:
        return Existing(living, None, str(error), None)


def _difference(task: Task, paths: RunPaths) -> str | None:
    """The first field of the binding configuration that the task changes.

    The trainer compares every binding field when it starts. This compares the fields in the task's envs before a
    machine is paid for.
    """
    bound, may_change = run_binding(paths), allowed(task)
    for field, value in sorted(bound.items()):
        wanted = task.envs.get(f"SKYSPOT_{field.upper()}")
        if wanted is None or field in may_change or _same(value, wanted):
            continue
        return f"{field} is {value!r} in the run and {wanted!r} here"
    return None


def _same(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return BOOLEANS.get(text.lower()) is value
    if isinstance(value, (int, float)):
        try:
            return float(text) == float(value)
        except ValueError:
            return False
    return value is None or text == str(value)


def refuse_errors(launch: Launch) -> None:
    """Refuse a task in which lint found errors.

    Raises:
        SkyspotError: lint found an error.
    """
    errors = [finding for finding in launch.findings if finding.level == "error"]
    if errors:
        lines = "\n".join(linter.shown(finding, launch.linted) for finding in errors)
        codes = " ".join(f"--ignore {code}" for code in dict.fromkeys(finding.name for finding in errors))
        remedy = "" if linter.refused(errors) else f"\nTo submit it anyway: {codes}"
        raise SkyspotError(f"lint found errors; nothing was submitted:\n{lines}{remedy}")


def refuse(launch: Launch, existing: Existing, replace: bool) -> None:
    """Refuse a launch that would harm an existing job or run.

    Raises:
        SkyspotError: a job of that name is active, the run has another binding configuration, or a limit of it is
            reached already.
    """
    _refuse_reached(launch, existing, time.time())
    for part, one in launch.each(existing):
        if one.differs:
            remedy = "Give it another name (-n)" if not existing.parts else f"Give task {part.name} another folder"
            raise SkyspotError(
                f"run {part.where if existing.parts else launch.name} was started with another configuration: "
                f"{one.differs}. {remedy}, or change the run on purpose: add --allow-config-change "
                f"{one.differs.split()[0]} to the trainer's command"
            )
    if existing.living and not replace:
        job = existing.living
        raise SkyspotError(
            f"job {job.id} named {launch.name} is active ({job.status}). Follow it with `skyspot logs "
            f"{launch.name}`, or add --replace to let it save and replace it"
        )


def _refuse_reached(launch: Launch, existing: Existing, now: float) -> None:
    """Refuse a launch whose limit is reached already: a machine would be paid for, to stop at once.

    Raises:
        UsageError: the deadline has passed, or a limit in money that was no lower has stopped the run.
    """
    for part, one in launch.each(existing):
        spend, deadline = limits_of(part.task)
        own = not existing.parts
        if deadline is not None and deadline <= now:
            remedy = "--deadline TIME|none" if own else f"another {DEADLINE} in the envs of task {part.name}"
            raise UsageError(f"the deadline of {part.name}, {shown_time(deadline)}, has passed. Launch with {remedy}")
        stopped = one.progress.limit if one.progress else {}
        most = number(stopped, "max_spend_usd") if stopped.get("cause") == records.MAX_SPEND else None
        if spend is not None and most is not None and spend <= most:
            remedy = "--max-spend USD|none" if own else f"a higher {MAX_SPEND} in the envs of task {part.name}"
            spent = f"USD {number(stopped, 'spent_usd') or 0.0:,.2f} is spent"
            raise UsageError(
                f"{part.name} has reached a spend limit of USD {most:,.2f}: about {spent}. Launch with {remedy}"
            )


def with_prices(launch: Launch, costs: Sequence[TaskPlan], update_trainer: bool) -> Launch:
    """The launch with the ladder's prices in its tasks, for the trainer's records and limits.

    Args:
        launch: The job that is ready to be submitted.
        costs: The plan of each task.
        update_trainer: Whether copies of the trainer are replaced.

    Raises:
        UsageError: a limit cannot be held: a price is not known, or the run's copy of the trainer knows no limits. Or
            max_hourly_cost, which may have been meant for spot, cuts off all rungs on demand.
    """
    for cost in costs:
        if all(rung.status == CUT and not rung.use_spot for rung in cost.rungs):
            raise UsageError(
                f"no rung of this task is left: {cost.rungs[0].why}. Raise max_hourly_cost: --max-hourly-cost, or in "
                f"{launch.linted}"
            )
    text = travel.with_prices(launch.text, [cost.rungs for cost in costs])
    has_limits = any(limit is not None for part in launch.parts for limit in limits_of(part.task))
    for run in launch.trainers if has_limits and not update_trainer else ():
        trainer = launch.path.parent / run / "trainer"
        if trainer.is_dir() and not (trainer / "attempt" / "limits.py").exists():
            raise UsageError(f"{trainer} is of a release that holds no limits. Replace it: add --update-trainer")
    return replace(launch, text=text)


def write(launch: Launch, update_trainer: bool) -> None:
    """Write .skyspot/<run>.yaml and its copy of the trainer."""
    payload.place(launch.path, launch.text, launch.trainers, update_trainer)
