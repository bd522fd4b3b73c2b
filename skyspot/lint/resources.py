"""Rules about resources: accelerators and places, rung by rung, and recovery from exits and preemptions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from skyspot.errors import did_you_mean, shown
from skyspot.lint.rules import Finding, Level
from skyspot.task.document import Rung, Task
from skyspot.task.gpus import NAMES, did_you_mean_gpu
from skyspot.task.known_keys import JOB_RECOVERY
from skyspot.task.ladder import NO_SPOT, OWN_MACHINES, STRATEGIES
from skyspot.task.located import Located
from trainer.layout.clouds import NOTICE_S
from trainer.layout.exit_codes import EXIT_NO_PROGRESS, EXIT_PREEMPTED, EXIT_STOPPED, EXIT_SUPERSEDED

# NVIDIA GPUs below compute capability 7.5, the minimum of CUDA 13 and so of torch 2.13 from PyPI.
_OLD_NAMES = ("K80", "M4000", "M60", "P100", "P4", "P40", "P4000", "P5000", "TITAN V", "V100", "V100-32GB")
TOO_OLD = frozenset(name.lower() for name in _OLD_NAMES)
"""Accelerators that CUDA 13 does not support, in lower case."""
# Instance types that have one of them.
_OLD_INSTANCES = (
    (re.compile(r"p2\..*|Standard_NC\d+r?"), "K80"),
    (re.compile(r"g3s?\..*|Standard_NV\d+(?:s_v[23])?"), "M60"),
    (re.compile(r"Standard_ND\d+r?s"), "P40"),
    (re.compile(r"Standard_NC\d+r?s_v2"), "P100"),
    (re.compile(r"p3\..*|Standard_NC\d+r?s_v3|gpu_\dx_v100.*"), "V100"),
    (re.compile(r"p3dn\..*|Standard_ND40rs_v2"), "V100-32GB"),
)
_NOT_CUDA = re.compile(r"tpu-|MI\d|Radeon|Gaudi|Inferentia|Trainium", re.IGNORECASE)
_ANYWHERE_S = NOTICE_S["gcp"]
"""The notice to assume for an entry that names no cloud."""
# `80GB+:8` and `nvidia:24GB:1` stand for all accelerators of that memory.
_MEMORY = re.compile(r"(?:[^:]*:)?\d+[GMT]B\+?(?::.*)?", re.IGNORECASE)
_OUR_STOPS = {
    EXIT_SUPERSEDED: "a newer attempt exists",
    EXIT_STOPPED: "it was asked to stop",
    EXIT_NO_PROGRESS: "it keeps crashing",
}


def findings(task: Task, grace: tuple[float, int | None] | None) -> Iterator[Finding]:
    """Find problems with a task's resources.

    Args:
        task: The task.
        grace: Seconds for the last save, and the line that sets them; None: unknown.
    """
    yield from _differing(task)
    yield from _recovery(task)
    yield from _accelerators(task)
    yield from _spot(task)
    if grace:
        yield from _grace(task, *grace)


def _differing(task: Task) -> Iterator[Finding]:
    """Find settings that must not differ among entries, though Task.validate() accepts that."""
    # fill_default_config_in_dag_for_job_launch() in sky/utils/dag_utils.py, and launch() in sky/jobs/server/core.py.
    for key, name in (("job_recovery", "differing-recovery"), ("priority", "differing-priority")):
        first = _comparable(task.rungs[0].settings.get(key))
        for rung in task.rungs[1:]:
            found = rung.settings.get(key)
            if _comparable(found) != first:
                yield Finding(
                    found.line if found else rung.line,
                    "error",
                    name,
                    f"{key} differs from the first entry's, which SkyPilot's server refuses",
                    f"Write {key} once, at the top of `resources`",
                )
                break


def _comparable(setting: Located | None) -> object:
    """Normalize a setting as SkyPilot compares it: with its default, in any spelling (Resources.__init__)."""
    plain = setting.plain() if setting else None
    recovery = {"strategy": plain} if isinstance(plain, str) else plain
    if not isinstance(recovery, dict):
        return recovery
    strategy = recovery.get("strategy")
    if strategy == "none":
        return None
    word = strategy.upper() if isinstance(strategy, str) else "EAGER_NEXT_REGION"
    return None if recovery.keys() <= {"strategy"} and word == "EAGER_NEXT_REGION" else {**recovery, "strategy": word}


def _recovery(task: Task) -> Iterator[Finding]:
    """Check job_recovery; a setting that several entries share is reported once."""
    seen: set[Finding] = set()
    for rung in task.rungs:
        recovery = rung.settings.get("job_recovery")
        found = [*_strategy(recovery), *_codes(task, rung)] if recovery else []
        for finding in found:
            if finding not in seen:
                seen.add(finding)
                yield finding
    if task.trainer:
        yield from _without_75(task)


def _strategy(recovery: Located) -> Iterator[Finding]:
    strategy = recovery.get("strategy") if recovery.entries else recovery
    word = strategy.text.upper() if strategy else ""
    if strategy and word == "EAGER_NEXT_REGION":
        # EagerFailoverStrategyExecutor.recover(), sky/jobs/recovery_strategy.py: it blocks the lost region only where
        # `_launched_resources.region is None`, and launched resources always have one.
        yield Finding(
            strategy.line,
            "warning",
            "eager-next-region",
            "EAGER_NEXT_REGION does not skip the region that was lost (SkyPilot issue 10021, open)",
            "Use FAILOVER, which tries the same region first and then all others, or expect the same region again",
        )
    elif strategy and word and word != "NONE" and word.lower() not in STRATEGIES:
        yield Finding(
            strategy.line,
            "error",
            "unknown-strategy",
            f"SkyPilot has no recovery strategy {shown(strategy.text)}",
            did_you_mean(word, [known.upper() for known in STRATEGIES]).strip() or "Use FAILOVER",
        )
    for key, value in recovery.entries.items():
        if key not in JOB_RECOVERY:
            # get_resources_schema(), sky/utils/schemas.py: additionalProperties is true here and false on the server.
            yield Finding(
                value.line,
                "error",
                "unknown-recovery-key",
                f"{shown(key)} is not a key of job_recovery: SkyPilot's client accepts it, but its server refuses it",
                did_you_mean(key, JOB_RECOVERY).strip() or f"Known keys: {', '.join(JOB_RECOVERY)}",
            )


def _codes(task: Task, rung: Rung) -> Iterator[Finding]:
    # should_restart_on_failure(), sky/jobs/recovery_strategy.py: one node's code is enough; restarts are not limited.
    for code, line in rung.recover_on:
        level: Level = "error"
        if code == 1:
            name, reason = (
                "recovers-on-errors",
                "every Python exception exits with 1, so a bug would restart the job forever",
            )
        elif code in (0, 137) and task.num_nodes > 1:
            # A failure also leaves the other nodes' codes: 0 of those that were done, 137 of those that
            # SkyPilot killed (sky/backends/task_codegen.py).
            name = "recovers-on-errors"
            reason = (
                f"with {task.num_nodes} nodes, any failure can leave {code} on another node and restart the job forever"
            )
        elif code == 0:
            name, reason, level = (
                "recovers-on-errors",
                "a job that exits with 0 has succeeded and is never recovered",
                "warning",
            )
        elif code == EXIT_PREEMPTED and not task.trainer and task.run.commands:
            name, level = "recovers-on-75", "warning"
            reason = (
                "75 requests a restart only from skyspot's trainer, which `run` does not start; other programs exit "
                "with 75 on a temporary failure (EX_TEMPFAIL), which could restart the job forever"
            )
        elif code in _OUR_STOPS and task.trainer:
            name, reason = (
                "recovers-on-a-stop",
                f"the trainer exits with {code} when {_OUR_STOPS[code]}, and must not be restarted",
            )
        else:
            continue
        yield Finding(
            line,
            level,
            name,
            reason,
            f"Remove {code} from recover_on_exit_codes"
            + ("; max_restarts_on_errors: 3 allows three restarts" if name == "recovers-on-errors" and code else ""),
        )


def _without_75(task: Task) -> Iterator[Finding]:
    assert task.trainer
    for rung in task.rungs:
        recovery = rung.settings.get("job_recovery")
        if EXIT_PREEMPTED not in [code for code, _ in rung.recover_on]:
            codes = recovery.get("recover_on_exit_codes") if recovery else None
            at = codes or recovery
            yield Finding(
                at.line if at else task.run.line(task.trainer.words[0]),
                "error",
                "no-75",
                "the trainer exits with 75 to be restarted, but recover_on_exit_codes does not list it: "
                "the first preemption notice would end the job",
                "Add job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [75]} to `resources`",
            )
            return


def _accelerators(task: Task) -> Iterator[Finding]:
    seen: set[Finding] = set()
    for rung in task.rungs:
        found = [_unknown(rung, name, line) for name, line in _named(rung)]
        found += [_unusable(task, rung, name, line) for name, line in accelerators(rung)]
        for finding in found:
            if finding and finding not in seen:
                seen.add(finding)
                yield finding


def accelerators(rung: Rung) -> list[tuple[str, int]]:
    """List name and line of each requested accelerator, including an old one that the instance type has."""
    instance = rung.settings.get("instance_type")
    old = [(name, instance.line) for types, name in _OLD_INSTANCES if instance and types.fullmatch(instance.text)]
    return _named(rung) + old


def _named(rung: Rung) -> list[tuple[str, int]]:
    """List name and line of each requested accelerator, except those requested by memory."""
    named = [(text.partition(":")[0].strip(), line) for text, line in rung.accelerators if not _MEMORY.fullmatch(text)]
    return [(name, line) for name, line in named if name]


def _unknown(rung: Rung, name: str, line: int) -> Finding | None:
    """Find a name that no catalog lists: canonicalize_accelerator_name(), sky/utils/accelerator_registry.py."""
    lower, known = name.lower(), NAMES
    parts = [other for other in known if lower in other.lower()]
    if rung.cloud in OWN_MACHINES or lower.startswith("tpu-v") or not name.isascii():
        return None  # A cluster has its own names; TPUs are not looked up.
    if lower in [other.lower() for other in known] or len(parts) == 1:
        return None
    if parts:
        reason = f"{shown(name)} is ambiguous ({', '.join(parts[:4])}), and SkyPilot refuses to guess"
        return Finding(line, "error", "unknown-gpu", reason, "Write one of these names in full")
    near = did_you_mean_gpu(name).strip()
    # Without a place, SkyPilot also asks its Kubernetes clusters, which have their own names.
    level: Level = "error" if near or rung.cloud else "warning"
    reason = f"SkyPilot's catalogs do not list the accelerator {shown(name)}, so no machine is ever found"
    return Finding(line, level, "unknown-gpu", reason, near or "See `sky show-gpus`")


def _unusable(task: Task, rung: Rung, name: str, line: int) -> Finding | None:
    if not task.trainer:
        return None
    old = name.lower() in TOO_OLD
    if not old and not _NOT_CUDA.match(name):
        return None
    why = "is too old for CUDA 13" if old else "is not a CUDA device"
    return Finding(
        line,
        # The image may bring another build of torch, which the trainer's setup then uses.
        "warning" if "image_id" in rung.settings else "error",
        "gpu-torch-cannot-use",
        f"{shown(name)} {why}, but the trainer's torch 2.13 is built for CUDA 13 and fails there",
        "Request A100, L4 or A10G instead, or set an image_id whose torch supports it",
    )


def _spot(task: Task) -> Iterator[Finding]:
    nowhere = [rung for rung in task.rungs if rung.use_spot and rung.cloud in NO_SPOT]
    for rung in nowhere:
        # The optimizer skips what no cloud offers (_fill_in_launchable_resources, sky/optimizer.py), and the
        # job is FAILED_PRECHECKS if nothing is left.
        whole = len(nowhere) == len(task.rungs)
        yield Finding(
            rung.settings["use_spot"].line,
            "error" if whole else "warning",
            "no-spot-there",
            f"{rung.cloud} has no spot instances: "
            + ("SkyPilot accepts the job and fails it before it starts" if whole else "this entry is never tried"),
            "Remove use_spot there",
        )
    if task.ordered:
        yield from _on_demand_first(task)


def _on_demand_first(task: Task) -> Iterator[Finding]:
    """Find on-demand entries before spot entries. One's own machines are never on-demand."""
    last_spot = max((at for at, rung in enumerate(task.rungs) if rung.use_spot), default=0)
    first = next(
        (rung for rung in task.rungs[:last_spot] if not rung.use_spot and rung.cloud not in OWN_MACHINES), None
    )
    if first:
        yield Finding(
            first.line,
            "warning",
            "on-demand-first",
            "an on-demand entry comes before spot entries: SkyPilot uses it first, at full price, and never moves a "
            "job from on-demand back to spot",
            "Move the on-demand entries to the end",
        )


def _grace(task: Task, grace_s: float, line: int | None) -> Iterator[Finding]:
    """Find a grace that is longer than the notice, in the place with the shortest notice."""
    # Kubernetes also evicts pods for other reasons.
    taken = [rung for rung in task.rungs if rung.use_spot or rung.cloud == "kubernetes"]
    known = [(NOTICE_S.get(rung.cloud) if rung.cloud else _ANYWHERE_S, rung) for rung in taken]
    short = [(notice_s, rung) for notice_s, rung in known if notice_s is not None and notice_s < grace_s]
    if not short:
        return
    notice_s, rung = min(short, key=lambda one: one[0])
    place = rung.settings.get("infra") or rung.settings.get("cloud") or rung.settings["use_spot"]
    yield Finding(
        place.line if line is None else line,
        "warning",
        "grace-too-long",
        f"a grace of {grace_s:g} s is longer than the {notice_s:g} s from notice to shutdown on "
        f"{rung.cloud or 'GCP and Azure'}: the machine may be gone before the last save is committed",
        f"Set --grace to less than {notice_s:g}",
    )
