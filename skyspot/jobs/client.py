"""The client of SkyPilot's managed jobs; the only module that imports sky, and only when a command needs SkyPilot.

Every function returns plain data of this module, or raises SkyspotError with one line and the remedy.
"""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from skyspot.errors import SkyspotError
from skyspot.home import unknown_user
from skyspot.money.waiting import StatusChange, status_change
from skyspot.task.ladder import OWN_MACHINES

SUPPORTED = ("0.14.1", "0.15")
"""The first version and the first version that is too new, as in pyproject.toml."""
FIELDS = (
    "job_id", "task_id", "job_name", "status", "resources", "infra", "recovery_count",
    "submitted_at", "job_duration", "details", "failure_reason", "schedule_state", "user_yaml", "task_name",
)  # fmt: skip
RUNNING = "RUNNING"
ENDED = ("SUCCEEDED", "CANCELLED")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LOG_PREFIX = re.compile(r"^[IWED] \d\d-\d\d \d\d:\d\d:\d\d(\.\d+)? (PID=\d+ )?\S+:\d+\] ?")
_REFUSAL = re.compile(
    r"ResourcesUnavailableError|ResourcesMismatchError|NoCloudAccessError|ProvisionPrechecksError|Failed to |"
    r"Permission denied|No (launchable )?resource|quota|[Cc]apacity|[Ii]nsufficient|timed? ?out|not available",
)
_REFUSAL_LINES = 400
MAX_EVENTS = 10_000
CATALOGS_S = 60.0
"""Longest wait of a dry run for SkyPilot's catalogs."""


@dataclass(frozen=True)
class Job:
    """One managed job."""

    id: int
    name: str
    status: str
    """SkyPilot's status: PENDING, STARTING, RUNNING, RECOVERING, CANCELLING, SUCCEEDED, ..."""
    resources: str
    infra: str
    recoveries: int
    submitted_at: float | None
    """Unix seconds."""
    duration_s: float | None
    details: str
    """SkyPilot's explanation: why the job waits or failed."""
    task: str
    """The task YAML that was submitted."""
    part: int = 0
    """The number of a pipeline's current task, from 0; the fields above describe that task."""
    parts: int = 1
    """The number of tasks."""
    part_name: str = ""
    """The name of a pipeline's current task."""
    beside: tuple[int, ...] = ()
    """The other running tasks of a job group."""

    @property
    def living(self) -> bool:
        """True if the job may still train."""
        return is_living(self.status)


def is_living(status: str) -> bool:
    """True if a job with this status may still train."""
    return status not in ENDED and not status.startswith("FAILED")


def submit(text: str, name: str, secrets: Mapping[str, str], quiet: bool = False) -> int:
    """Submit a task YAML as a managed job; returns the job's ID.

    Args:
        text: The task YAML; relative paths in it start from the working folder.
        name: The job's name.
        secrets: Values of the task's secrets; they are in no file.
        quiet: Whether to hide SkyPilot's progress, which otherwise goes to stderr.
    """
    with _talking(secrets.values()) as sky, _stdout_to_stderr():
        from sky.utils import dag_utils

        dag = dag_utils.load_dag_from_yaml_str(text, secrets_overrides=list(secrets.items()))
        request = sky.jobs.launch(dag, name=name)
        # Never print the handle in the answer: its repr raises if the controller runs in the API server.
        ids, _ = sky.get(request) if quiet else sky.stream_and_get(request, output_stream=sys.stderr)
    if not ids:
        raise SkyspotError("SkyPilot accepted the job but returned no ID; see `sky jobs queue`")
    return int(ids[0])


def check(text: str, secrets: Mapping[str, str], made: Collection[str] = ()) -> list[str]:
    """Validate a task YAML with SkyPilot's client code, without its server; returns what could not be checked.

    SkyPilot downloads the catalogs of accelerators and places if they are missing. Checks that depend on the enabled
    clouds are left to the server.

    Args:
        text: The task YAML; relative paths in it start from the working folder.
        secrets: Values of the task's secrets.
        made: Sources of file_mounts that a launch will write; they need not exist yet.

    Raises:
        SkyspotError: SkyPilot refuses the task.
    """
    with _stdout_to_stderr(), _talking(secrets.values()):
        from sky.utils import dag_utils

        dag = dag_utils.load_dag_from_yaml_str(text, secrets_overrides=list(secrets.items()))
        tasks: list[Any] = list(dag.tasks)
        for task in tasks:
            task.validate_name()
            task.validate_run()
            task.expand_and_validate_workdir()
            mounts = task.file_mounts or {}
            task.file_mounts = {target: source for target, source in mounts.items() if source not in made} or None
            task.expand_and_validate_file_mounts()
        dag_utils.fill_default_config_in_dag_for_job_launch(dag)
        resources = [resource for task in tasks for resource in task.resources if not _needs_clouds(resource)]
        unchecked = _look_up(resources) if resources else None
    return [f"accelerators and places: {unchecked}"] if unchecked else []


def _needs_clouds(resource: Any) -> bool:
    """True if SkyPilot needs the enabled clouds to validate these resources (sky/resources.py)."""
    if resource.cloud is None:
        return any(
            (
                resource.region,
                resource.zone,
                resource.instance_type,
                resource.ports,
                resource.labels,
                resource.local_disk,
            )
        )
    return str(resource.cloud).lower() in OWN_MACHINES or bool(resource.image_id)


def _look_up(resources: Sequence[Any]) -> str | None:
    """Validate resources with SkyPilot's catalogs; returns why that failed. SkyPilot's downloads have no time limit."""
    outcomes: SimpleQueue[Exception | None] = SimpleQueue()

    def validate() -> None:
        try:
            for resource in resources:
                resource.validate()
            outcomes.put(None)
        except Exception as error:
            outcomes.put(error)

    threading.Thread(target=validate, daemon=True).start()
    try:
        with redirect_stdout(io.StringIO()):  # SkyPilot prints markup for a progress bar.
            error = outcomes.get(timeout=CATALOGS_S)
    except Empty:
        return f"SkyPilot's catalogs did not arrive within {CATALOGS_S:.0f} s"
    if error is None or type(error).__name__ == "NoCloudAccessError":
        return None
    if type(error).__module__.partition(".")[0] in ("builtins", "sky") and not isinstance(
        error, (OSError, ImportError)
    ):
        raise error
    return f"SkyPilot's catalogs could not be downloaded ({type(error).__name__})"


def queue(ids: Sequence[int] | None = None, living: bool = False, start: bool = True) -> list[Job]:
    """The managed jobs, newest first; a job with several tasks is described by its current task.

    Args:
        ids: Only jobs with these IDs.
        living: Only jobs that have not ended.
        start: Whether SkyPilot may start its local server if none runs.

    Raises:
        SkyspotError: SkyPilot cannot be reached.
    """
    with _talking() as sky:
        from sky import exceptions
        from sky.server.common import check_server_healthy

        if not start:
            check_server_healthy()
        try:
            records, *_ = sky.get(
                sky.jobs.queue_v2(
                    refresh=False, skip_finished=living, job_ids=list(ids) if ids else None, fields=FIELDS
                )
            )
        except exceptions.ClusterNotUpError:
            return []  # There was never a managed job, or its controller is stopped: no job is active.
        jobs: dict[int, list[Any]] = {}
        for record in sorted(records, key=lambda one: one.task_id or 0):
            jobs.setdefault(int(record.job_id), []).append(record)
    return sorted(map(job_of, jobs.values()), key=lambda job: -job.id)


def job_of(records: Sequence[Any]) -> Job:
    """A job from SkyPilot's records: one record, or one for each task of a pipeline, in order.

    The current task is the first task that has not succeeded; in a job group it is the first active task.
    """
    states = [one.status.value if one.status else "PENDING" for one in records]
    on = next((number for number, state in enumerate(states) if is_living(state)), None)
    if on is None:
        on = next((number for number, state in enumerate(states) if state != ENDED[0]), len(records) - 1)
    record = records[on]
    details = [str(part) for part in (record.failure_reason, record.details) if part]
    infra = str(record.infra or "")
    return Job(
        id=int(record.job_id),
        name=str(record.job_name or ""),
        status=states[on],
        resources=str(record.resources or ""),
        infra="" if infra == "-" else infra,
        recoveries=int(record.recovery_count or 0),
        submitted_at=record.submitted_at,
        duration_s=record.job_duration,
        details=" ".join(" ".join(details).split()),
        task=next((str(one.user_yaml) for one in records if one.user_yaml), ""),
        part=int(record.task_id or 0),
        parts=max(len(records), int(record.task_id or 0) + 1),
        part_name=str(record.task_name or "") if len(records) > 1 else "",
        beside=tuple(
            int(one.task_id or 0) for number, one in enumerate(records) if number != on and states[number] == RUNNING
        ),
    )


def last_refusal(job_id: int) -> str | None:
    """The last reason in the controller's log why a starting job has no machine yet; None if there is none."""
    log = io.StringIO()
    with _talking() as sky:
        sky.jobs.tail_logs(job_id=job_id, controller=True, follow=False, tail=_REFUSAL_LINES, output_stream=log)
    return refusal_in(log.getvalue())


def refusal_in(log: str) -> str | None:
    """The last line of a controller's log that says why there is no machine, without time stamps and colours."""
    for line in reversed(log.splitlines()):
        text = _LOG_PREFIX.sub("", _plain(line).strip()).strip(" │├└─╰⨯✗•")
        text = re.sub(r"^\([^)]*pid=\d+\) ?", "", text)
        if _REFUSAL.search(text):
            return text
    return None


def job_events(job_id: int, task: int) -> list[StatusChange]:
    """SkyPilot's record of a job's states, oldest first. Starts no server.

    SkyPilot has no call for it in its SDK, so this is the request that its dashboard makes (POST /jobs/events).

    Args:
        job_id: The job.
        task: The number of the task in the job, from 0.

    Raises:
        SkyspotError: SkyPilot cannot be reached, or does not know the job.
    """
    with _talking() as sky:
        from sky.server import common
        from sky.server.requests import payloads

        common.check_server_healthy()
        body = payloads.GetJobEventsBody(job_id=job_id, task_id=task, limit=MAX_EVENTS)
        response = common.make_authenticated_request(
            "POST", "/jobs/events", json=json.loads(body.model_dump_json()), timeout=(5, 30)
        )
        rows = sky.get(common.get_request_id(response))
    changes = [found for row in rows if (found := status_change(row))]
    return sorted(changes, key=lambda one: one.at)


def follow_logs(job_id: int, *, controller: bool, follow: bool) -> int:
    """Have SkyPilot print a job's log, until the job ends if `follow`; returns 1 if the job failed, otherwise 0."""
    with _talking() as sky:
        code = sky.jobs.tail_logs(job_id=job_id, controller=controller, follow=follow)
    return 0 if code in (None, 0, 101) else 1


def cancel(job_id: int) -> None:
    """Have SkyPilot cancel a job: it sends SIGTERM, then removes the machines."""
    with _talking() as sky, _stdout_to_stderr():
        sky.get(sky.jobs.cancel(job_ids=[job_id]))


def bucket_url(name: str) -> str | None:
    """The URL of a bucket that SkyPilot created; None if SkyPilot does not know it."""
    schemes = {"S3": "s3", "GCS": "gs", "R2": "r2", "AZURE": "az"}
    with _talking() as sky:
        for record in sky.get(sky.storage_ls()):
            if record.name == name:
                for store in record.store:
                    if store.value in schemes:
                        return f"{schemes[store.value]}://{name}"
    return None


# -- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def _talking(hidden: Any = ()) -> Iterator[Any]:
    """The sky package; SkyPilot's errors in the block become one line with the remedy.

    Args:
        hidden: Values that a message must not show.
    """
    if trouble := unknown_user():
        raise SkyspotError(trouble)
    try:
        import sky
        import sky.jobs
    except ModuleNotFoundError as error:
        raise SkyspotError(
            f"SkyPilot's installation is incomplete ({error}): pip install 'skypilot>={SUPPORTED[0]}'"
        ) from None
    _check_version(sky.__version__)
    try:
        yield sky
    except SkyspotError:
        raise
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except Exception as error:
        line = in_a_line(error)
        for value in hidden:
            line = line.replace(value, "***") if value else line
        raise SkyspotError(line) from error


def _check_version(version: str) -> None:
    if not SUPPORTED[0] <= version or not _numbers(SUPPORTED[0]) <= _numbers(version) < _numbers(SUPPORTED[1]):
        raise SkyspotError(
            f"SkyPilot {version} is installed; this release supports skypilot>={SUPPORTED[0]},<{SUPPORTED[1]}: "
            f"pip install 'skypilot>={SUPPORTED[0]},<{SUPPORTED[1]}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


_REMEDIES = {
    "ApiServerConnectionError": "SkyPilot's API server does not answer. Start it with `sky api start`, or use another "
    "server with `sky api login -e URL`",
    "ApiServerAuthenticationError": "SkyPilot's API server needs a login: `sky api login`",
    "NoCloudAccessError": "no cloud is enabled in SkyPilot; `sky check` shows what is missing",
    "APIVersionMismatchError": "SkyPilot's API server and this client have different versions: `sky api stop; sky api "
    "start`, or install the server's version",
    "ClusterNotUpError": "SkyPilot's jobs controller is stopped; `sky jobs queue --refresh` starts it",
    "PermissionDeniedError": "SkyPilot's API server denies permission",
}


def in_a_line(error: BaseException) -> str:
    """SkyPilot's error as one line: with our remedy if we have one, otherwise its own first line."""
    for kind in type(error).__mro__:
        if kind.__name__ in _REMEDIES:
            return f"{_REMEDIES[kind.__name__]} ({_first(error).partition('. ')[0].rstrip('.')})"
    module = type(error).__module__.partition(".")[0]
    if module in ("requests", "urllib3", "aiohttp"):
        return f"{_REMEDIES['ApiServerConnectionError']} ({_first(error)})"
    return f"SkyPilot refused: {_first(error)}"


def _first(error: BaseException) -> str:
    text = _plain(str(getattr(error, "message", "") or error)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first = lines[0]
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1]}"
    return first if len(first) <= 300 else f"{first[:300]}..."


def _plain(text: str) -> str:
    return _ANSI.sub("", text)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect SkyPilot's output: our stdout is reserved for our own answer."""
    kept, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = kept
