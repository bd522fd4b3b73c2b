"""Rules about keys: the file must be a SkyPilot task, and SkyPilot must know its keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from skyspot.errors import did_you_mean, shown
from skyspot.lint.rules import Finding
from skyspot.task.document import Task
from skyspot.task.known_keys import HEADER, JOB_RECOVERY, KNOWN, OPEN, SETTINGS, VOLUME
from skyspot.task.located import Located

# Old spellings that `skyspot.migrate`, or SkyPilot itself, still translates.
_OLD = {
    "": ("api_access", "experimental"),
    **dict.fromkeys(
        ("resources", "resources.any_of.*", "resources.ordered.*"), ("candidates", "gpus", "max_price", "spot_recovery")
    ),
    "resources.accelerator_args": ("tf_version",),
}
# Common mistakes, and the right key.
_MEANT = {
    "": {
        "cmd": "run", "command": "run", "commands": "run", "script": "run", "env": "envs", "env_vars": "envs",
        "environment": "envs", "working_dir": "workdir", "working_directory": "workdir", "nodes": "num_nodes",
        "mounts": "file_mounts",
    },
    "resources": {"gpu": "accelerators", "spot": "use_spot", "image": "image_id", "disk": "disk_size"},
}  # fmt: skip
_STORAGE = "Use file_mounts instead: file_mounts: {MOUNT_PATH: {name: BUCKET, source: FOLDER_OR_URL, mode: MOUNT}}"
_REMEDIES = {
    ("", "storage"): _STORAGE,
    ("", "storage_mounts"): _STORAGE,
    ("", "max_restarts_on_errors"): "Move it to `resources`: job_recovery: {max_restarts_on_errors: N}",
    ("service", "spot_recovery"): "Remove it; SkyServe replaces every lost replica",
    ("service", "spot_policy"): "Move its keys to replica_policy",
    ("service", "auto_restart"): "Remove it; SkyServe restarts replicas by itself",
    ("service.replica_policy", "auto_restart"): "Remove it; SkyServe restarts replicas by itself",
    ("service.replica_policy", "qps_upper_threshold"): "Use target_qps_per_replica",
    ("service.replica_policy", "qps_lower_threshold"): "Use target_qps_per_replica",
    ("service.replica_policy", "num_extra"): "Use num_overprovision",
    ("service.replica_policy", "spot_mixer"): "Use dynamic_ondemand_fallback: true",
}


def what_it_is(root: Located) -> tuple[str, str] | None:
    """Recognize a document that is not a task: its kind, and what to do with it. None if it may be a task."""
    keys = root.entries.keys()
    task_only = keys & {"run", "setup", "resources", "workdir", "file_mounts", "envs", "num_nodes"}
    if task_only or not keys:
        return None
    if {"apiVersion", "kind"} <= keys:
        return "a Kubernetes manifest", "Pass it to `kubectl apply`"
    services = root.get("services")
    if services and services.entries:
        return "a docker-compose file", "Write a task that starts it: run: docker compose up"
    jobs = root.get("jobs")
    if jobs and any(job.get("runs-on", "steps", "uses") for job in jobs.entries.values()):
        return "a GitHub workflow", "Pass the task YAML that it uses to `launch`"
    if "dependencies" in keys and keys <= {"name", "channels", "dependencies", "prefix", "variables"}:
        return "a conda environment", "Create it in a task's `setup`: conda env create -f FILE"
    if "type" in keys and keys <= {*VOLUME}:
        return "a volume", "Create it with `sky volumes apply`, then mount it in a task: volumes: {/mnt/data: NAME}"
    if keys & {*SETTINGS} and keys <= {*SETTINGS, "name"}:
        return (
            "a file of SkyPilot settings",
            "SkyPilot reads it as .sky.yaml or ~/.sky/config.yaml. Pass a task YAML to `launch`",
        )
    return None


def findings(task: Task) -> Iterator[Finding]:
    """Find the keys that SkyPilot does not know, or report that the document is not a task."""
    other = what_it_is(task.root)
    if other:
        yield Finding(task.root.line, "error", "not-a-task", f"this is {other[0]}, not a SkyPilot task", other[1])
        return
    yield from _unknown(task.root, "")
    for key, purpose, command in (
        ("service", "SkyServe service", "sky serve up"),
        ("pool", "pool of workers", "sky jobs pool apply"),
    ):
        found = task.root.get(key)
        if found:
            reason = f"`{key}` makes this a {purpose}, not a managed job"
            yield Finding(found.line, "error", "service-section", reason, f"Start it with `{command}`")


def is_job(task: Task) -> bool:
    """True if the document describes a job, to which the other rules apply."""
    return what_it_is(task.root) is None and task.root.get("service", "pool") is None


def _unknown(at: Located, place: str) -> Iterator[Finding]:
    known = KNOWN.get(place)
    for key, value in at.entries.items():
        if known and key not in known and not key.startswith("_") and key not in _OLD.get(place, ()):
            yield _finding(place, key, value.line)
        for below in (f"{place}.{key}" if place else key, f"{place}.*"):
            if below in _PLACES:
                yield from _unknown(value, below)
    if f"{place}.*" in _PLACES:
        for item in at.items:
            yield from _unknown(item, f"{place}.*")


_PLACES: Mapping[str, None] = dict.fromkeys(
    ".".join(path.split(".")[: depth + 1]) for path in KNOWN for depth in range(path.count(".") + 1)
)


def _finding(place: str, key: str, line: int) -> Finding:
    where = f" in {place.replace('.*', '')}" if place else ""
    if place in OPEN:
        reason = f"SkyPilot {'ignores' if place.startswith('file') else 'may refuse'} the key {shown(key)}{where}"
        return Finding(line, "warning", "unknown-key", reason, _remedy(place, key))
    return Finding(line, "error", "unknown-key", f"unknown key {shown(key)}{where}", _remedy(place, key))


def _remedy(place: str, key: str) -> str:
    if (place, key) in _REMEDIES:
        return _REMEDIES[place, key]
    meant = _MEANT.get("resources" if place.startswith("resources.") else place, {}).get(key.lower())
    if meant:
        return f"Did you mean {meant!r}?"
    for other in ("", "resources", "resources.job_recovery"):
        if key in _known(other) and other != place:
            return f"It belongs {f'in {other}' if other else 'at the top level'}; check the indentation"
    if place.startswith("file_mounts") and key in KNOWN["file_mounts.*.config.mount_cached"]:
        return "It belongs in `config`, under `mount` or `mount_cached`"
    near = did_you_mean(key, _known(place)).strip()
    if near:
        return near
    for other in ("resources", ""):
        near = did_you_mean(key, _known(other)).strip()
        if near and not place.startswith(("config", "service")):
            return near.replace("?", f", {f'in {other}' if other else 'at the top level'}?")
    near = "" if place else did_you_mean(key, HEADER).strip()
    if near:
        where = "a first document of its own, above the tasks"
        return f"It belongs in {where}" if key in HEADER else near.replace("?", f", in {where}?")
    known = _known(place)
    return f"Known keys: {', '.join(known)}" if len(known) < 10 else "See SkyPilot's task YAML reference for all keys"


def _known(place: str) -> tuple[str, ...]:
    return JOB_RECOVERY if place == "resources.job_recovery" else KNOWN[place]
