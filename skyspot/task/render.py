"""Renders a template and options to a task YAML with a header. No network, no sky, and it writes no task.

The one file that it may write is ~/.config/skyspot/user-id: without --bucket, the bucket is named after it.
"""

from __future__ import annotations

import hashlib
import re
import secrets as random_words
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyspot import __version__
from skyspot.errors import UsageError, shown
from skyspot.task import buckets, gpus, ladder, started, template
from skyspot.task.mounts import CHECKPOINT_DIR, TRAINER
from skyspot.task.options import WRITTEN, Options

_HEADER = re.compile(r"\A# Rendered by skyspot \S+ from .+ \(([0-9a-f]{6,64})\)\.")
TRACKERS = ("tensorboard", "wandb", "trackio")
"""The experiment trackers that the trainer knows; rendering imports nothing of it."""
_SECOND = "#   sky jobs launch "
_RENEWED = re.compile("SKYSPOT_(?:MAX_SPEND|DEADLINE|SPEND_ALLOWANCE|PRICES)")
_ADJECTIVES = "amber brave calm deft eager fleet grand happy ideal jolly keen lucid merry noble quick sunny tidy vivid"
_NOUNS = "badger comet delta ember falcon glacier harbor island juniper kestrel lagoon meadow otter pebble quartz river"


@dataclass(frozen=True)
class Rendered:
    """A rendered task YAML, with notes."""

    name: str
    text: str
    notes: tuple[str, ...]
    """Hints and warnings for stderr."""
    trainer: bool
    """True if it needs the trainer beside it as payload."""
    before: str | None = None
    """The user's own YAML that it was made from; None: it comes from a template."""


def generated_name() -> str:
    """Generate a name for a run: `keen-otter-4f1a`."""
    words = [random_words.choice(_ADJECTIVES.split()), random_words.choice(_NOUNS.split()), random_words.token_hex(2)]
    return "-".join(words)


def from_template(options: Options) -> Rendered:
    """Render the task YAML of a template, given by name or path.

    Raises:
        UsageError: an option is invalid.
    """
    chosen = template.find(options.task)
    notes: list[str] = []
    name = options.name
    if name is None:
        name = generated_name()
        notes.append(f"Run name: {name} (generated; -n NAME sets it)")
    given = dict(options.parameters)
    declared = {parameter.name for parameter in chosen.parameters}
    if options.save_every is not None:
        if "save_every" not in declared:
            raise UsageError(f"--save-every: template {chosen.name} has no parameter save_every")
        given["save_every"] = options.save_every
    store = buckets.checkpoints(options.bucket)
    mounts: dict[str, Any] = {store.mount: store.source} if store.mount else {}
    data = options.data
    if data is not None and buckets.is_url(data):
        source = buckets.data(data)
        mounts[source.mount or buckets.DATA_POINT] = source.source
        data = source.folder
    if data is not None and "data" in declared:
        given["data"] = data
    parameters = template.values(chosen, given)
    needs_trainer = chosen.trainer
    if "command" in declared:
        command = started.launched(parameters["command"], parameters.pop("processes", ""))
        parameters["command"] = command
        needs_trainer = needs_trainer or started.needs_trainer(command, str(parameters.get("workdir", "")))
    _bend_defaults(parameters, given)
    _check_sizes(parameters)
    if needs_trainer:
        mounts[TRAINER] = f"{WRITTEN}/{name}/trainer"
    if chosen.trainer and options.data is None and parameters.get("data") == "stdlib":
        model = "training the tiny demo model" if parameters.get("model") == "tiny" else "training"
        notes.append(f"No --data given: {model} on Python's own source code (free).")
    if options.bucket is None and store.source:
        notes.append(f"No --bucket given: SkyPilot will create the bucket {store.source['name']} and keep it.")
    rungs, more = _rungs(options)
    notes += more
    context = {
        **parameters,
        "name": name,
        "num_nodes": options.num_nodes or 1,
        "resources": ladder.resources(
            rungs,
            strategy=options.strategy or "failover",
            recover_on_exit_codes=[ladder.RECOVER] if needs_trainer else [],
            max_hourly_cost=options.max_hourly_cost,
        ),
        "envs": {**_envs(store, name, data, parameters), **options.env},
        "secrets": dict.fromkeys(options.secret),
        "file_mounts": mounts,
    }
    text = with_header(_limited(template.render(chosen, context), options), name, _source(chosen.path))
    return Rendered(name, text, tuple(notes), needs_trainer)


def _limited(text: str, options: Options) -> str:
    """The task with the limits that the options give."""
    if not options.has_limits:
        return text
    from skyspot.task.limits import with_limits  # Rarely needed.

    return with_limits(text, options.max_spend, options.deadline, options.spend_allowance, time.time())


def _rungs(options: Options) -> tuple[list[ladder.Rung], list[str]]:
    """Build the ladder, and notes on it."""
    groups = gpus.parse(options.gpus) if options.gpus is not None else []
    use_spot = options.use_spot is not False
    rungs = ladder.rungs(
        groups,
        prefer=list(options.prefer),
        infra=options.infra,
        use_spot=use_spot,
        on_demand_last=bool(options.on_demand_last),
    )
    return rungs, [*gpus.hints(groups), *ladder.notes(rungs, use_spot)]


def _bend_defaults(parameters: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Adapt default sizes to the given ones, as the trainer does."""
    whole, part = parameters.get("global_batch_size"), _size(parameters.get("micro_batch_size"))
    if isinstance(whole, int) and part is not None and whole > 0 and part > 0:
        if "micro_batch_size" not in given:
            parameters["micro_batch_size"] = str(next(size for size in range(part, 0, -1) if whole % size == 0))
        elif "global_batch_size" not in given:
            parameters["global_batch_size"] = -(-whole // part) * part
    steps, warmup = parameters.get("max_steps"), parameters.get("warmup_steps")
    if isinstance(steps, int) and isinstance(warmup, int) and steps > 0 and "warmup_steps" not in given:
        parameters["warmup_steps"] = min(steps, warmup)


def _size(value: object) -> int | None:
    """A size as a number; None for `auto` and for what is no size."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        return int(value)
    return value if type(value) is int else None


def _check_sizes(parameters: dict[str, Any]) -> None:
    """Refuse now what the trainer would refuse on a paid machine.

    Raises:
        UsageError: an invalid size, or a micro-batch that does not divide the batch.
    """
    every = parameters.get("save_every")
    if isinstance(every, str) and not re.fullmatch(r"0*[1-9]\d{0,8}|auto", every):
        raise UsageError(f"--save-every: {shown(every)} is neither a positive number of steps nor `auto`")
    micro = parameters.get("micro_batch_size")
    if isinstance(micro, str) and not re.fullmatch(r"0*[1-9]\d{0,8}|auto", micro):
        raise UsageError(f"--set micro_batch_size: {shown(micro)} is neither a positive number of samples nor `auto`")
    length = parameters.get("seq_len")
    if isinstance(length, str) and not re.fullmatch(r"(?:0*[1-9]\d{0,8})?", length):
        raise UsageError(f"--set seq_len: {shown(length)} is not a positive number of tokens")
    for name in re.split(r" *, *", str(parameters.get("report_to") or "").strip()):
        if name and name not in TRACKERS:
            raise UsageError(f"--set report_to: {shown(name)} is none of {', '.join(TRACKERS)}")
    for name in ("max_steps", "global_batch_size", "micro_batch_size", "seq_len", "save_every"):
        value = parameters.get(name)
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--set {name}: must be positive, not {value}")
    whole, part = parameters.get("global_batch_size"), _size(micro)
    if isinstance(whole, int) and part is not None and whole % part:
        raise UsageError(f"--set micro_batch_size: {part} does not divide global_batch_size {whole}")


def _envs(store: buckets.Store, name: str, data: str | None, parameters: dict[str, Any]) -> dict[str, str]:
    """Build the task's environment: all user values, as text."""
    found = {"SKYSPOT_MOUNT": store.mount} if store.mount else {}
    found[CHECKPOINT_DIR] = f"{store.folder.rstrip('/')}/{name}"
    if data is not None:
        found["SKYSPOT_DATA"] = data
    for key, value in parameters.items():
        if (key, value) == ("report_to", ""):
            continue  # Most tasks report to no tracker; the template passes on what is set.
        text = (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )
        if isinstance(value, float) and float(text) != value:
            text = repr(value)
        found[f"SKYSPOT_{key.upper()}"] = text
    return found


def _source(path: Path) -> str:
    """Name a template for the header; bundled and ejected templates get the same name."""
    name = re.sub(r"[^A-Za-z0-9._/-]", "_", path.name)
    return f"templates/{name}" if path.parent.name == "templates" else name


def with_header(body: str, name: str, source: str) -> str:
    """Add the header, a comment with the task YAML's origin and hash."""
    digest = _digest(body)
    return (
        f"# Rendered by skyspot {__version__} from {source} ({digest}). With its payload"
        f" (`-o .`) it works by itself:\n{_SECOND}.skyspot/{name}.yaml -n {name}\n{body}"
    )


def headed(rendered: Rendered, source: Path) -> Rendered:
    """Add a header to a plain YAML, to recognize later edits; a rendered template has one already."""
    if rendered.before is None:
        return rendered
    body = rendered.text.removeprefix("\ufeff")
    if _HEADER.match(body):  # An older header: the file was written for a run.
        body = body.partition("\n")[2]
        body = body.partition("\n")[2] if body.startswith(_SECOND) else body
    return replace(rendered, text=with_header(body, rendered.name, _source(source)))


def edited_by_hand(text: str) -> bool:
    """True if a rendered file was changed since it was rendered."""
    body = text.split("\n", 2)[2] if text.count("\n") > 2 else ""
    return _digest(body) != rendered_from(text)


def _digest(body: str) -> str:
    """What an edit by hand changes; limits and prices do not count, because each launch may renew them."""
    if _RENEWED.search(body):
        from skyspot.task.limits import without_limits  # The import would take a third of the time.

        body = without_limits(body)
    return hashlib.sha256(body.encode()).hexdigest()[:6]


def rendered_from(text: str) -> str | None:
    """Read the hash of the originally rendered text from a file's header; None if there is no header."""
    found = _HEADER.match(text)
    return found[1] if found else None
