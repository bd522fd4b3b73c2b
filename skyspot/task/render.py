"""Template and options -> task YAML text, and its header. Pure: no network, no sky, nothing written."""

from __future__ import annotations

import hashlib
import re
import secrets as random_words
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyspot import __version__
from skyspot.errors import UsageError, shown
from skyspot.task import buckets, gpus, ladder, template
from skyspot.task.mounts import CHECKPOINT_DIR, TRAINER
from skyspot.task.options import WRITTEN, Options

_HEADER = re.compile(r"\A# Rendered by skyspot \S+ from .+ \(([0-9a-f]{6,64})\)\.")
_SECOND = "#   sky jobs launch "
_ADJECTIVES = "amber brave calm deft eager fleet grand happy ideal jolly keen lucid merry noble quick sunny tidy vivid"
_NOUNS = "badger comet delta ember falcon glacier harbor island juniper kestrel lagoon meadow otter pebble quartz river"


@dataclass(frozen=True)
class Rendered:
    """A task YAML, and what there is to say about it."""

    name: str
    text: str
    notes: tuple[str, ...]
    """Hints and warnings, for stderr."""
    trainer: bool
    """Whether the trainer has to lie beside it as its payload."""
    before: str | None = None
    """The user's own YAML that it was made of; None: it comes from a template."""


def made_up_name() -> str:
    """A name for a run that was given none: `keen-otter-4f1a`."""
    words = [random_words.choice(_ADJECTIVES.split()), random_words.choice(_NOUNS.split()), random_words.token_hex(2)]
    return "-".join(words)


def from_template(options: Options) -> Rendered:
    """The task YAML of a template's name or path.

    Raises:
        UsageError: whatever is wrong with what was asked for, in a line.
    """
    chosen = template.find(options.task)
    notes: list[str] = []
    name = options.name
    if name is None:
        name = made_up_name()
        notes.append(f"Run name: {name} (made up; -n NAME sets it)")
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
    _bend_defaults(parameters, given)
    _check_sizes(parameters)
    if chosen.trainer:
        mounts[TRAINER] = f"{WRITTEN}/{name}/trainer"
    if chosen.trainer and options.data is None and parameters.get("data") == "stdlib":
        notes.append("No --data: this is a trial on the standard library's own source (model and data cost nothing).")
    if options.bucket is None and store.source:
        notes.append(f"No --bucket: SkyPilot will make the bucket {store.source['name']} and keep it.")
    rungs, more = _rungs(options)
    notes += more
    context = {
        **parameters,
        "name": name,
        "num_nodes": options.num_nodes or 1,
        "resources": ladder.resources(
            rungs,
            strategy=options.strategy or "failover",
            recover_on_exit_codes=[ladder.RECOVER] if chosen.trainer else [],
            max_hourly_cost=options.max_hourly_cost,
        ),
        "envs": {**_envs(store, name, data, parameters), **options.env},
        "secrets": dict.fromkeys(options.secret),
        "file_mounts": mounts,
    }
    text = with_header(template.render(chosen, context), name, _source(chosen.path))
    return Rendered(name, text, tuple(notes), chosen.trainer)


def _rungs(options: Options) -> tuple[list[ladder.Rung], list[str]]:
    """What to ask for, and what there is to say about that."""
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
    """Adapt the sizes that were not given to those that were, as the trainer does."""
    whole, part = parameters.get("global_batch_size"), parameters.get("micro_batch_size")
    if isinstance(whole, int) and isinstance(part, int) and whole > 0 and part > 0:
        if "micro_batch_size" not in given:
            parameters["micro_batch_size"] = next(size for size in range(part, 0, -1) if whole % size == 0)
        elif "global_batch_size" not in given:
            parameters["global_batch_size"] = -(-whole // part) * part
    steps, warmup = parameters.get("max_steps"), parameters.get("warmup_steps")
    if isinstance(steps, int) and isinstance(warmup, int) and steps > 0 and "warmup_steps" not in given:
        parameters["warmup_steps"] = min(steps, warmup)


def _check_sizes(parameters: dict[str, Any]) -> None:
    """Refuse here what the trainer would refuse on a machine that is paid for.

    Raises:
        UsageError: a size that is none, or a micro-batch that does not divide the batch.
    """
    every = parameters.get("save_every")
    if isinstance(every, str) and not re.fullmatch(r"0*[1-9]\d{0,8}|auto", every):
        raise UsageError(f"--save-every: {shown(every)} is neither a number of steps above 0 nor auto")
    for name in ("max_steps", "global_batch_size", "micro_batch_size", "seq_len", "save_every"):
        value = parameters.get(name)
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--set {name}: {value} is not above 0")
    whole, part = parameters.get("global_batch_size"), parameters.get("micro_batch_size")
    if isinstance(whole, int) and isinstance(part, int) and whole % part:
        raise UsageError(f"--set micro_batch_size: {part} does not divide global_batch_size {whole}")


def _envs(store: buckets.Store, name: str, data: str | None, parameters: dict[str, Any]) -> dict[str, str]:
    """The environment of the task: every value of the user's, as text."""
    found = {"SKYSPOT_MOUNT": store.mount} if store.mount else {}
    found[CHECKPOINT_DIR] = f"{store.folder.rstrip('/')}/{name}"
    if data is not None:
        found["SKYSPOT_DATA"] = data
    for key, value in parameters.items():
        text = (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )
        if isinstance(value, float) and float(text) != value:
            text = repr(value)
        found[f"SKYSPOT_{key.upper()}"] = text
    return found


def _source(path: Path) -> str:
    """A template as the header names it: the bundled ones and ./templates/ alike, so that ejecting changes nothing."""
    name = re.sub(r"[^A-Za-z0-9._/-]", "_", path.name)
    return f"templates/{name}" if path.parent.name == "templates" else name


def with_header(body: str, name: str, source: str) -> str:
    """A task YAML under a comment that says where it comes from and what the text hashed to."""
    digest = hashlib.sha256(body.encode()).hexdigest()[:6]
    return (
        f"# Rendered by skyspot {__version__} from {source} ({digest}). Written with its payload (`-o .`)"
        f" it works alone:\n{_SECOND}.skyspot/{name}.yaml -n {name}\n{body}"
    )


def headed(rendered: Rendered, source: Path) -> Rendered:
    """What is written of it: a plain YAML under a header of its own, which tells later who changed what."""
    if rendered.before is None:
        return rendered
    body = rendered.text.removeprefix("\ufeff")
    if _HEADER.match(body):  # It was written for a run, or copied from what was.
        body = body.partition("\n")[2]
        body = body.partition("\n")[2] if body.startswith(_SECOND) else body
    return replace(rendered, text=with_header(body, rendered.name, _source(source)))


def edited_by_hand(text: str) -> bool:
    """Whether a rendered file is no longer what was rendered."""
    body = text.split("\n", 2)[2] if text.count("\n") > 2 else ""
    return hashlib.sha256(body.encode()).hexdigest()[:6] != rendered_from(text)


def rendered_from(text: str) -> str | None:
    """The hash of what had been rendered into a file, as its header keeps it; None where it has no header."""
    found = _HEADER.match(text)
    return found[1] if found else None
