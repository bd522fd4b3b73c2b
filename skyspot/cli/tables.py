"""The plan of a launch and the queue, as tables for 80 columns and as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from skyspot.cli.columns import fold, new_table, show
from skyspot.cli.cost_tables import price_columns, price_lines
from skyspot.cli.format import ago, clock, many
from skyspot.jobs.launch import Existing, Launch, Part
from skyspot.jobs.training import TrackedJob
from skyspot.money.plan import TaskPlan
from skyspot.money.travel import zone_note
from skyspot.task.document import Rung, Task
from skyspot.task.ladder import OWN_MACHINES
from skyspot.wording import first_few

_HIDDEN = "***"


def _accelerators(rung: Rung) -> list[str]:
    """The alternatives, each as NAME:COUNT."""
    return [text for text, _ in rung.accelerators] or [str(rung.values.get("instance_type") or "CPU")]


def _market(rung: Rung) -> str:
    return "own machines" if rung.cloud in OWN_MACHINES else "spot" if rung.use_spot else "on-demand"


def _shared_lines(launch: Launch, existing: Existing) -> list[str]:
    """The lines of the plan that hold for all tasks."""
    lines = []
    if existing.unchecked:
        lines.append(f"Jobs:        not checked for an active job of this name: {existing.unchecked}")
    for run in launch.trainers:
        trainer = launch.path.parent / run / "trainer"
        if trainer.is_dir():
            lines.append(f"Trainer:     {trainer}, from an earlier launch (--update-trainer replaces it)")
    if launch.secrets:
        lines.append("Secrets:     " + ", ".join(f"{name}={_HIDDEN}" for name in launch.secrets))
    return lines


def _lines_of(part: Part, existing: Existing) -> list[str]:
    """The lines of the plan below the rungs of one task."""
    lines = []
    if part.where:
        lines.append(f"Checkpoints: {part.where}")
    if part.makes_bucket:
        lines.append(f"Bucket:      {part.makes_bucket}; SkyPilot creates it if it does not exist, and keeps it")
    own = [name for name in part.task.envs if not name.startswith("SKYSPOT_")]
    if own:
        lines.append(f"Environment: {first_few(own, 3)}")
    if existing.progress:
        done = f"step {existing.progress.committed_step}" if existing.progress.committed_step else "its start"
        lines.append(f"Resumes:     {part.name} from {done}, after {many(existing.progress.attempts, 'attempt')}")
    elif existing.unread:
        lines.append(f"Run folder:  not read: {existing.unread}")
    else:
        lines.append("Run folder:  new")
    return lines


def show_plan(launch: Launch, existing: Existing, costs: Sequence[TaskPlan] = ()) -> None:
    """Print each task's rungs with their prices, and where its checkpoints are stored.

    Args:
        launch: The job that is ready to be submitted.
        existing: What already has its name.
        costs: The plan of each task; empty: prices are not shown.
    """
    console = Console(highlight=False)
    several = len(launch.parts) > 1
    if several:
        how = "side by side" if launch.is_group else "one after another"
        console.print(f"Job {launch.name}: {len(launch.parts)} tasks, {how}.", markup=False)
    for number, (part, one) in enumerate(
        zip(launch.parts, existing.parts or [existing] * len(launch.parts), strict=True), 1
    ):
        what = f"\nTask {number}, {part.name}" if several else f"Run {launch.name}"
        console.print(f"{what}. {_order(part.task)}", markup=False)
        cost = costs[number - 1] if costs else None
        show(_rung_table(part.task, console.width, cost))
        limits = [f"Limits:      {cost.limits_line}"] if cost and cost.limits_line else []
        if cost and cost.max_spend_usd is not None and (note := zone_note(cost.rungs)):
            limits.append(f"{'':<13}{note}")
        for line in [*(price_lines(cost) if cost else []), *limits, *_lines_of(part, one)]:
            click.echo(line)
    shared = _shared_lines(launch, existing)
    if several and shared:
        click.echo()
    for line in shared:
        click.echo(line)


def _order(task: Task) -> str:
    if task.ordered:
        return "SkyPilot will try these in order and use the first one available:"
    if task.listed:
        return "SkyPilot will use the cheapest of these that is available:"
    return "SkyPilot will look for:"


def _rung_table(task: Task, width: int, cost: TaskPlan | None) -> Table:
    """The rungs for a terminal of that width; accelerators and places are broken only between their parts."""
    asked, nodes = task.rungs, str(task.num_nodes)
    columns = {"": [str(number) for number in range(1, len(asked) + 1)]}
    columns["accelerators"] = columns["where"] = []
    columns["nodes"] = [nodes] * len(asked)
    columns["market"] = [_market(rung) for rung in asked]
    columns |= price_columns(cost) if cost else {}
    costs = ["-" if rung.max_hourly_cost is None else str(rung.max_hourly_cost) for rung in asked]
    if any(limit != "-" for limit in costs):
        columns["max USD/h"] = costs
    left = width - sum(max(map(len, [name, *cells])) + 2 for name, cells in columns.items() if cells) - 2
    places = [re.split("(?<=[/:])", rung.place or "anywhere") for rung in asked]
    longest = max(len("".join(place)) for place in places)
    columns["accelerators"] = [fold(_accelerators(rung), " or ", max(left - longest, left // 2)) for rung in asked]
    used = max(len(line) for kind in [*columns["accelerators"], "accelerators"] for line in kind.split("\n"))
    columns["where"] = [fold(place, "", left - used) for place in places]
    order = ["", "accelerators", "nodes", "market", "where"]
    names = [*order, *(name for name in columns if name not in order)]
    table = new_table(*names, right=[name for name in names if name not in ("accelerators", "market", "where")])
    for cells in zip(*(columns[name] for name in names), strict=True):
        table.add_row(*cells)
    return table


def plan_json(
    launch: Launch, existing: Existing, job_id: int | None, state: str, costs: Sequence[TaskPlan] = ()
) -> dict[str, Any]:
    """The plan of a launch as JSON."""
    return {
        "name": launch.name,
        "path": str(launch.path),
        "job_id": job_id,
        "state": state,
        "checkpoints": str(launch.where) if launch.where else None,
        "makes_bucket": launch.makes_bucket,
        "rungs": _rungs(launch.parts[0].task) if len(launch.parts) == 1 else [],
        "num_nodes": launch.parts[0].task.num_nodes if len(launch.parts) == 1 else None,
        "resumes_from_step": existing.progress.committed_step if existing.progress else None,
        "tasks": [
            {
                "name": part.name,
                "checkpoints": str(part.where) if part.where else None,
                "makes_bucket": part.makes_bucket,
                "rungs": _rungs(part.task),
                "num_nodes": part.task.num_nodes,
                "resumes_from_step": one.progress.committed_step if one.progress else None,
                "prices": [rung.to_json() for rung in costs[number].rungs] if costs else [],
                "hours": length.hours if costs and (length := costs[number].length) else None,
                "limits_passed": costs[number].run_limits_passed if costs else [],
            }
            for number, (part, one) in enumerate(launch.each(existing))
        ],
        "findings": [
            {"line": f.line, "level": f.level, "name": f.name, "reason": f.reason, "remedy": f.remedy, "task": f.task}
            for f in launch.findings
        ],
        "notes": list(launch.notes),
    }


def _rungs(task: Task) -> list[dict[str, Any]]:
    return [rung.values for rung in task.rungs]


def show_queue(jobs: Sequence[TrackedJob]) -> None:
    """Print managed jobs with their training progress."""
    table = new_table(
        "id", "name", "status", "step", "loss", "attempts", "saved", "resources",
        right=("id", "step", "loss", "attempts", "saved"),
    )  # fmt: skip
    for one in jobs:
        p = one.progress
        steps = f"{_or(p.step)}/{_or(p.max_steps)}" if p else "-"
        table.add_row(
            str(one.job.id),
            f"{one.job.name} {one.job.part + 1}/{one.job.parts} {one.job.part_name}".strip()
            if one.job.parts > 1
            else one.job.name,
            f"{one.job.status} {clock(one.job.duration_s)}".strip(),
            "finished" if p and p.finished else steps,
            f"{p.loss:.3f}" if p and p.loss is not None else "-",
            str(p.attempts) if p else "-",
            ago(p.committed_at) if p else "-",
            " ".join(part for part in (one.job.resources, one.job.infra) if part),
        )
    show(table)
    for one in jobs:
        if one.waits_for:
            click.echo(f"{one.job.id} {one.job.status}: {_cut(one.waits_for)}")
        elif one.job.status.startswith("FAILED") and one.job.details:
            click.echo(f"{one.job.id} {one.job.status}: {_cut(one.job.details)}")
        if one.progress and (note := one.progress.limits_note(one.job.name)):
            click.echo(f"{one.job.id}: {note}")
        if one.unread and one.job.living and not one.waits_for:
            click.echo(f"{one.job.id}: no progress shown: {_cut(one.unread)}")


def queue_json(jobs: Sequence[TrackedJob]) -> list[dict[str, Any]]:
    """The queue as JSON; times are unix seconds."""
    rows = []
    for one in jobs:
        job, p = one.job, one.progress
        rows.append(
            {
                "id": job.id, "name": job.name, "task": job.part_name or None, "task_number": job.part + 1,
                "tasks": job.parts, "status": job.status, "resources": job.resources, "infra": job.infra,
                "recoveries": job.recoveries, "submitted_at": job.submitted_at, "duration_s": job.duration_s,
                "details": job.details, "waits_for": one.waits_for or None, "unread": one.unread or None,
                "step": p.step if p else None, "max_steps": p.max_steps if p else None, "loss": p.loss if p else None,
                "attempts": p.attempts if p else None, "committed_step": p.committed_step if p else None,
                "committed_at": p.committed_at if p else None, "finished": p.finished if p else None,
                "cause": p.cause if p else None, "limits": (p.limits_note(job.name) or None) if p else None,
            }
        )  # fmt: skip
    return rows


def _or(value: int | None) -> str:
    return "-" if value is None else str(value)


def _cut(text: str, limit: int = 240) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
