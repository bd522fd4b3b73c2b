"""The settings of a run: one typed field per option, validated before training starts.

Standard library only: they are read before any process of the training is started.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.errors import TrainerError
from trainer.layout.clouds import DEFAULT_GRACE_S, NOTICE_S

HANG_TIMEOUT_S = 600.0
"""How long training may stand still."""
PRECISIONS = ("fp32", "bf16", "fp16")
ON_NAN = ("stop", "skip", "ignore")
DEFAULT_GLOBAL_BATCH_SIZE = 8
DEFAULT_MICRO_BATCH_SIZE = 4
TRACKERS = ("tensorboard", "wandb", "trackio")
"""Experiment trackers; the names are those of their packages too."""
AUTO = "auto"
INPUT_BINDINGS = frozenset({"data_key", "data_hash", "data_revision", "model_revision", "model_files", "n_samples"})
"""Names that bind a run and whose values are known only after the data and the model were found."""


class ConfigError(TrainerError):
    """A setting makes no sense; the message names it, the reason and the remedy."""


def option(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    flag: str = "",
    choices: Sequence[str] = (),
    above: float | None = None,
    at_least: float | None = None,
    reason: str = "",
    auto: bool = False,
) -> Any:
    """A dataclass field that is an option of the command line.

    Args:
        help: Its line in --help.
        default: Its value when the option is not given; without one, the option is required.
        flag: The option's name where it differs from the field's.
        choices: All values that are allowed.
        above: The value must be greater than this.
        at_least: The value must not be less than this.
        reason: Why a smaller value is refused.
        auto: Whether "auto" is allowed as well.
    """
    metadata = {
        "help": help, "flag": flag, "choices": choices, "above": above, "at_least": at_least, "reason": reason,
        "auto": auto,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings that SpotRun needs for any training."""

    checkpoint_dir: Path = option("the run's folder in the mounted bucket")
    max_steps: int | None = option("total number of optimizer steps", default=None, above=0)
    global_batch_size: int = option(  # None becomes a number in __post_init__, as for micro_batch_size.
        "samples per optimizer step, over all processes (default: 8, or the next multiple of --micro-batch-size)",
        default=None,
        above=0,
    )
    micro_batch_size: int | Literal["auto"] = option(
        "samples per forward pass; must divide --global-batch-size (default: 4, or the next smaller divisor); auto "
        "finds how many fit into memory, and halves them where memory runs out",
        default=None,
        above=0,
        auto=True,
    )
    seed: int = option("random seed (data order, weights, dropout)", default=0, at_least=0)
    precision: str = option("numeric precision of the model's computations", default="fp32", choices=PRECISIONS)
    save_interval_steps: int | None = option(
        "steps between checkpoints; auto derives them from the cost of a save and the rate of preemptions",
        default=20,
        flag="--save-every",
        above=0,
    )
    save_failures: int = option("end the attempt after this many failed saves in a row", default=3, above=0)
    keep_latest: int = option(
        "number of newest checkpoints to keep; at least 2",
        default=3,
        at_least=2,
        reason="a preemption may have torn the newest",
    )
    keep_every: int = option(
        "permanently keep the first checkpoint at or after each multiple of this many steps; 0: none",
        default=0,
        at_least=0,
    )
    grace_s: float | None = option(
        f"seconds from SIGTERM to SIGKILL (default: {DEFAULT_GRACE_S:g}, {NOTICE_S['runpod']:g} on RunPod, "
        "or the value given to trainer.launch)",
        default=None,
        flag="--grace",
        at_least=0,
    )
    gcp_notice_s: float | None = option(
        f"seconds of notice of a Google Cloud instance with preemptionNoticeDuration (default: {NOTICE_S['gcp']:g})",
        default=None,
        flag="--gcp-notice",
        at_least=0,
    )
    eval_interval_steps: int = option(
        "steps between evaluations; 0: do not evaluate", default=0, flag="--eval-every", at_least=0
    )
    max_grad_norm: float = option("clip gradients to this norm; 0: do not clip", default=1.0, at_least=0)
    on_nan: str = option(
        "action for a step whose loss or gradients are NaN or infinite: stop ends the run after three in a row, "
        "skip drops the step's update, ignore applies it",
        default="stop",
        choices=ON_NAN,
    )
    processes: int | None = option(
        "processes on this machine (default: one per accelerator, or 1 on the CPU)", default=None, above=0
    )
    peer_timeout_s: float = option(
        "seconds without a heartbeat after which a peer counts as gone",
        default=120.0,
        flag="--peer-timeout",
        at_least=1,
    )
    hang_timeout_s: float = option(
        "seconds in which training must show that it lives, once its first step has ended; 0: no limit",
        default=HANG_TIMEOUT_S,
        flag="--hang-timeout",
        at_least=0,
    )
    allow_config_change: tuple[str, ...] = option(
        "field that may differ from the run's first attempt; repeatable", default=()
    )
    report_to: tuple[str, ...] = option(
        "experiment tracker for the metrics of each step; repeatable, or several with commas between them",
        default=(),
        choices=TRACKERS,
    )
    cpu: bool = option("train on the CPU even if GPUs are available", default=False)
    deterministic: bool = option("use deterministic algorithms, for bit-identical resumes on a GPU", default=False)

    def __post_init__(self) -> None:
        """Refuse values that make no sense, and choose the batch sizes that were not given.

        Raises:
            ConfigError: names the field, and a value that works.
        """
        if not isinstance(self.checkpoint_dir, (str, os.PathLike)):
            raise ConfigError(f"--checkpoint-dir: {self.checkpoint_dir!r:.60} is not a folder")
        object.__setattr__(self, "checkpoint_dir", Path(self.checkpoint_dir))
        object.__setattr__(self, "report_to", named(self.report_to))
        for item in dataclasses.fields(self):
            _validate(item, getattr(self, item.name))
        if self.seed >= 1 << 63:
            raise ConfigError(f"--seed: {self.seed} has more than 63 bits")
        self._choose_batch_sizes()
        part = self.micro_batch_size
        if isinstance(part, int) and self.global_batch_size % part:
            divisors = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - part))[:2]
            raise ConfigError(
                f"--micro-batch-size {part} does not divide --global-batch-size "
                f"{self.global_batch_size}; {' or '.join(map(str, sorted(near)))} would"
            )

    def _choose_batch_sizes(self) -> None:
        """Fill in the sizes that were not given; a default adapts to the size that was."""
        whole: int | None = self.global_batch_size
        part: int | str | None = self.micro_batch_size
        if whole is None:
            part = part or DEFAULT_MICRO_BATCH_SIZE
            whole = (
                DEFAULT_GLOBAL_BATCH_SIZE if part == AUTO else -(-DEFAULT_GLOBAL_BATCH_SIZE // int(part)) * int(part)
            )
        elif part is None:
            part = next(size for size in range(DEFAULT_MICRO_BATCH_SIZE, 0, -1) if whole % size == 0)
        object.__setattr__(self, "global_batch_size", whole)
        object.__setattr__(self, "micro_batch_size", part)

    def to_json(self) -> dict[str, Any]:
        """The settings as they are recorded."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

        return {item.name: plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


def flag_of(item: dataclasses.Field[Any]) -> str:
    """The option of a field."""
    return item.metadata["flag"] or "--" + item.name.replace("_", "-")


def _validate(item: dataclasses.Field[Any], value: Any) -> None:
    choices, above, at_least = (item.metadata[name] for name in ("choices", "above", "at_least"))
    if choices and not isinstance(value, tuple) and value not in choices:
        raise ConfigError(f"{flag_of(item)}: {value!r} is none of {', '.join(choices)}")
    if value is None or (above is None and at_least is None):
        return
    if value == AUTO and item.metadata["auto"]:
        return
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if above is not None and not (is_number and value > above):
        raise ConfigError(f"{flag_of(item)}: {value} is not above {above}")
    if at_least is not None and not (is_number and value >= at_least):
        reason = f": {item.metadata['reason']}" if item.metadata["reason"] else ""
        raise ConfigError(f"{flag_of(item)}: {value} is less than {at_least}{reason}")


def named(trackers: object, option: str = "--report-to") -> tuple[str, ...]:
    """The names of trackers, each once, in the order in which they are given, with or without commas.

    Raises:
        ConfigError: one is unknown.
    """
    given: list[Any] = [trackers]
    if isinstance(trackers, Iterable) and not isinstance(trackers, str):
        given = list(trackers)
    if not all(isinstance(one, str) for one in given):
        raise ConfigError(f"{option}: {trackers!r:.60} is no list of names")
    names = dict.fromkeys(name.strip() for one in given for name in one.split(",") if name.strip())
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"{option}: {name!r} is none of {', '.join(TRACKERS)}.{did_you_mean(name, TRACKERS)}")
    return tuple(names)


def not_installed(trackers: Iterable[str]) -> str:
    """A line that names the trackers whose packages are missing, with the remedy; empty if none is."""
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"{' and '.join(missing)}: not installed on this machine. To report there: pip install {' '.join(missing)}"


def did_you_mean(word: str, known: Collection[str]) -> str:
    """A question that names the known word nearest to an unknown one; empty where none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_field(names: Iterable[str], known: Collection[str]) -> str | None:
    """An error message for the first name that is not a known field; None if all are known."""
    for name in names:
        if name not in known:
            hint = did_you_mean(name.replace("-", "_"), sorted(known)) or " The run's manifests list its fields."
            return f"--allow-config-change {name!r}: there is no such field.{hint}"
    return None
