"""The trainer's settings: one typed field per option, refused early where they make no sense.

Standard library and yaml only: it is read before any process of the training is started.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trainer.errors import TrainerError
from trainer.launch.link import DEFAULT_GRACE_S

PRECISIONS = ("fp32", "bf16", "fp16")
ON_NAN = ("stop", "skip", "ignore")
SCHEDULES = ("cosine", "linear", "constant")
DEFAULT_MAX_STEPS = 60
DEFAULT_WARMUP_STEPS = 6
DEFAULT_GLOBAL_BATCH_SIZE = 8
DEFAULT_MICRO_BATCH_SIZE = 4
LATER = frozenset({"data_key", "data_hash", "data_revision", "model_revision", "model_files", "n_samples"})
"""What binds a run besides, and is known only once data and model are there."""
# Named in the interface, built in a later release: refused rather than ignored.
NOT_YET = {
    "--max-spend": "a spend limit",
    "--deadline": "a deadline",
    "--shard": "sharding",
    "--grad-checkpointing": "gradient checkpointing",
}


class ConfigError(TrainerError):
    """A setting makes no sense; the message says which, why, and what to do."""


def _option(help: str, *, default: Any = dataclasses.MISSING, flag: str = "", choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": help, "flag": flag, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What SpotRun needs to know, whatever is trained."""

    checkpoint_dir: Path = _option("the run's folder, in the mounted bucket")
    max_steps: int | None = _option("optimizer steps in all", default=None)
    global_batch_size: int | None = _option(
        "samples per step, on any number of machines (default: 8, or the next multiple of --micro-batch-size)",
        default=None,
    )
    micro_batch_size: int | None = _option(
        "samples per forward pass; divides --global-batch-size (default: 4, or the next smaller divisor)", default=None
    )
    seed: int = _option("of the order, the initial weights and every random number", default=0)
    precision: str = _option("of the arithmetic", default="fp32", choices=PRECISIONS)
    save_interval_steps: int | None = _option(
        "steps between checkpoints; auto: from what a save costs and how often machines are taken",
        default=20,
        flag="--save-every",
    )
    save_failures: int = _option("failed saves in a row that end the attempt", default=3)
    keep_latest: int = _option("whole checkpoints to keep; at least 2", default=3)
    keep_every: int = _option(
        "the first checkpoint at or after each multiple of so many steps is kept for good; 0: none", default=0
    )
    grace_s: float | None = _option(
        f"seconds from SIGTERM to SIGKILL (default: {DEFAULT_GRACE_S:g}, or what trainer.launch was given)",
        default=None,
        flag="--grace",
    )
    eval_interval_steps: int = _option("steps between evaluations; 0: none", default=0, flag="--eval-every")
    max_grad_norm: float = _option(
        "gradients are clipped: scaled down to this norm where theirs is above it; 0: never", default=1.0
    )
    on_nan: str = _option(
        "steps whose loss or gradients are NaN or infinite: stop ends the run after three in a row, skip drops the "
        "update of each, ignore trains on",
        default="stop",
        choices=ON_NAN,
    )
    processes: int | None = _option("processes; default: one per accelerator, or 1 on the CPU", default=None)
    peer_timeout_s: float = _option(
        "seconds without a sign of life after which a peer counts as gone", default=120.0, flag="--peer-timeout"
    )
    allow_config_change: tuple[str, ...] = _option("a field that may differ from the run's first attempt", default=())
    cpu: bool = _option("train on the CPU even where there are GPUs", default=False)
    deterministic: bool = _option("deterministic algorithms, for bit-identical resumes on a GPU", default=False)

    def __post_init__(self) -> None:
        """Fill in the batch sizes that were not given, and refuse what makes no sense.

        A default never makes a given value impossible: it gives way.

        Raises:
            ConfigError: says which field, and what would do.
        """
        _positive(self, "save_failures")
        for name in ("global_batch_size", "micro_batch_size", "max_steps", "processes", "save_interval_steps"):
            if getattr(self, name) is not None:
                _positive(self, name)
        _at_least(self, "keep_latest", 2, "the newest may be the one that a preemption tore")
        _at_least(self, "eval_interval_steps", 0)
        _at_least(self, "keep_every", 0)
        _at_least(self, "seed", 0)
        if self.seed >= 1 << 63:
            raise ConfigError(f"--seed: {self.seed} has more than 63 bits")
        _at_least(self, "peer_timeout_s", 1)
        _at_least(self, "max_grad_norm", 0)
        if self.grace_s is not None:
            _at_least(self, "grace_s", 0)
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision: {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.on_nan not in ON_NAN:
            raise ConfigError(f"--on-nan: {self.on_nan!r} is none of {', '.join(ON_NAN)}")
        self._fill_in_batch_sizes()
        assert self.global_batch_size
        assert self.micro_batch_size
        if self.global_batch_size % self.micro_batch_size:
            divisors = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.micro_batch_size))[:2]
            raise ConfigError(
                f"--micro-batch-size {self.micro_batch_size} does not divide --global-batch-size "
                f"{self.global_batch_size}; {' or '.join(map(str, sorted(near)))} would"
            )

    def _fill_in_batch_sizes(self) -> None:
        whole, part = self.global_batch_size, self.micro_batch_size
        if whole is None:
            part = part or DEFAULT_MICRO_BATCH_SIZE
            whole = -(-DEFAULT_GLOBAL_BATCH_SIZE // part) * part
        elif part is None:
            part = next(size for size in range(DEFAULT_MICRO_BATCH_SIZE, 0, -1) if whole % size == 0)
        object.__setattr__(self, "global_batch_size", whole)
        object.__setattr__(self, "micro_batch_size", part)

    def to_json(self) -> dict[str, Any]:
        """The settings as they are recorded."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

        return {item.name: plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """What the bundled training program needs besides."""

    model: str = _option("tiny, a model's folder, or a hub's id", default="tiny")
    data: str = _option(
        "stdlib, a folder or file of .txt or .jsonl (a `text` field), also as .gz, or an id on the Hugging Face Hub",
        default="stdlib",
    )
    epochs: float | None = _option("passes over the data, instead of --max-steps", default=None)
    seq_len: int = _option("tokens a sample", default=128)
    lr: float = _option("peak learning rate", default=1e-3)
    lr_schedule: str = _option("of the learning rate", default="cosine", choices=SCHEDULES)
    warmup_steps: int | None = _option(
        f"steps to the peak learning rate (default: {DEFAULT_WARMUP_STEPS}, or all steps of a shorter run)",
        default=None,
    )
    weight_decay: float = _option("of AdamW, on matrices", default=0.1)
    beta1: float = _option("of AdamW", default=0.9)
    beta2: float = _option("of AdamW", default=0.95)
    report_to: str = _option("tracker", default="none")

    def __post_init__(self) -> None:
        """Refuse what makes no sense; says which field, and what would do."""
        super().__post_init__()
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ConfigError(f"--{name}: is empty; leave it out, or give a value")
        _positive(self, "lr")
        _at_least(self, "seq_len", 2, "the first token of a sample is not predicted")
        if self.warmup_steps is not None:
            _at_least(self, "warmup_steps", 0)
        _at_least(self, "weight_decay", 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name}: {getattr(self, name)} is not in [0, 1)")
        if self.epochs is not None:
            _positive(self, "epochs")
            if self.max_steps is not None:
                raise ConfigError("--epochs and --max-steps both say where training ends: give one of them")
        elif self.max_steps is None:
            object.__setattr__(self, "max_steps", DEFAULT_MAX_STEPS)
        if self.lr_schedule not in SCHEDULES:
            raise ConfigError(f"--lr-schedule: {self.lr_schedule!r} is none of {', '.join(SCHEDULES)}")
        if self.max_steps is not None:
            self.warmup_for(self.max_steps)
        if self.report_to != "none":
            raise ConfigError(f"--report-to {self.report_to}: not in this release; say none")
        if trouble := unknown_field(self.allow_config_change, self._known()):
            raise ConfigError(trouble)

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's."""
        return self.beta1, self.beta2

    def binding(self) -> dict[str, Any]:
        """What may not change between attempts: all that decides which samples, which LR and which loss a step has."""
        names = (
            "model", "seq_len", "global_batch_size", "seed", "lr", "lr_schedule", "warmup_steps", "weight_decay",
            "beta1", "beta2", "max_grad_norm", "max_steps", "epochs",
        )  # fmt: skip
        return {"optimizer": "adamw", **{name: getattr(self, name) for name in names}, **self._warmup()}

    def to_json(self) -> dict[str, Any]:
        """The settings as they are recorded."""
        return {**super().to_json(), **self._warmup()}

    def _warmup(self) -> dict[str, int]:
        """The warm-up as it is recorded: the default as it is named, so that a run may become longer."""
        return {"warmup_steps": DEFAULT_WARMUP_STEPS if self.warmup_steps is None else self.warmup_steps}

    def warmup_for(self, max_steps: int) -> int:
        """Steps to the peak learning rate in a run of `max_steps`.

        Raises:
            ConfigError: more were given than the run has.
        """
        if self.warmup_steps is None:
            return min(DEFAULT_WARMUP_STEPS, max_steps)
        if self.warmup_steps > max_steps:
            end = f"--max-steps {max_steps}" if self.max_steps is not None else f"the {max_steps} steps of the run"
            raise ConfigError(f"--warmup-steps {self.warmup_steps} is more than {end}")
        return self.warmup_steps

    def _known(self) -> set[str]:
        """What --allow-config-change may name."""
        return {item.name for item in dataclasses.fields(self)} | self.binding().keys() | LATER

    def steps_for(self, n_samples: int, done: int = 0, consumed: int = 0) -> int:
        """Where training ends, for a number of samples.

        Args:
            n_samples: How many there are.
            done: Steps that the run has done.
            consumed: Samples that it has consumed in them: more or fewer than `done` steps take now, after the global
                batch size was changed.
        """
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        if consumed == done * self.global_batch_size:
            return max(1, math.ceil(self.epochs * n_samples / self.global_batch_size))
        return max(1, done, done + math.ceil((self.epochs * n_samples - consumed) / self.global_batch_size))


def parse(argv: Sequence[str]) -> TrainConfig:
    """The settings from a command line and its --config file; the command line wins.

    Raises:
        ConfigError: a mistake of the user's, in a line or two.
    """
    parser = _parser()
    given = vars(parser.parse_args(list(argv)))
    config_file = given.pop("config", None)
    values = {**(_from_file(Path(config_file)) if config_file else {}), **given}
    if "allow_config_change" in values:
        values["allow_config_change"] = tuple(values["allow_config_change"])
    if not str(values.get("checkpoint_dir", "")):
        raise ConfigError("--checkpoint-dir is missing: the run's folder in the mounted bucket, /checkpoints/RUN say")
    values["checkpoint_dir"] = Path(values["checkpoint_dir"])
    return TrainConfig(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag_of(item: dataclasses.Field[Any]) -> str:
    """The option of a field."""
    return item.metadata.get("flag") or "--" + item.name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainer",
        description="Train a causal language model on machines that may be taken away; resume exactly.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; the command line wins")
    for item in dataclasses.fields(TrainConfig):
        help = item.metadata["help"]
        if item.default not in (dataclasses.MISSING, None, ()) and not isinstance(item.default, bool):
            help += f" (default: {item.default})"
        kind = str(item.type)
        if kind == "bool":
            parser.add_argument(flag_of(item), dest=item.name, action="store_true", help=help)
        elif kind.startswith("tuple"):
            parser.add_argument(flag_of(item), dest=item.name, action="append", metavar="FIELD", help=help)
        else:
            convert = _converter(item)
            parser.add_argument(
                flag_of(item), dest=item.name, type=convert, help=help, metavar=_metavar(item), action=_Once
            )
    for flag, what in NOT_YET.items():
        parser.add_argument(flag, nargs="?", action=_NotYet, help=argparse.SUPPRESS, metavar=what)
    parser.parse_args = _with_nearest(parser)  # type: ignore[method-assign]
    return parser


def _metavar(item: dataclasses.Field[Any]) -> str:
    if item.metadata["choices"]:
        return "|".join(item.metadata["choices"])
    if item.name == "save_interval_steps":
        return "STEPS|auto"
    return {"int": "N", "int | None": "N", "float": "X", "float | None": "X", "Path": "FOLDER"}.get(
        str(item.type), "TEXT"
    )


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)


class _NotYet(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        raise ConfigError(f"{option}: {self.metavar} is not in this release; leave the option out")


def _with_nearest(parser: argparse.ArgumentParser) -> Any:
    def parse_args(args: list[str]) -> argparse.Namespace:
        namespace, unknown = parser.parse_known_args(args)
        if unknown:
            known = [option for action in parser._actions for option in action.option_strings]
            word = unknown[0].partition("=")[0]
            raise ConfigError(f"unknown option {word!r}.{_nearest(word, known)}")
        return namespace

    return parse_args


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_field(names: Iterable[str], known: Collection[str]) -> str | None:
    """A line on the first of the names that no field has, with the nearest that one has; None: all are fields."""
    for name in names:
        if name not in known:
            near = _nearest(name.replace("-", "_"), sorted(known)) or " What binds a run stands in its manifests."
            return f"--allow-config-change {name!r}: there is no such field.{near}"
    return None


def _converter(item: dataclasses.Field[Any]) -> Any:
    def convert(text: str) -> Any:
        return _converted(item, text)

    return convert


def _converted(item: dataclasses.Field[Any], value: Any) -> Any:
    """A value of the field's type, from text or from YAML."""
    flag, kind = flag_of(item), str(item.type).removesuffix(" | None")
    if value == "auto" and item.name == "save_interval_steps":
        return None
    if value == "auto" and item.name == "micro_batch_size":
        raise ConfigError(f"{flag} auto is not in this release: give a number")
    try:
        if kind == "int":
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(value)
        if kind == "float":
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{flag}: {value!r} is not {'a whole number' if kind == 'int' else 'a number'}") from None
    if kind == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{flag}: {value!r} is neither true nor false")
    if kind.startswith("tuple"):
        return tuple(map(str, value)) if isinstance(value, list) else (str(value),)
    if kind in ("str", "Path") and not isinstance(value, (str, Path)):
        raise ConfigError(f"{flag}: {value!r} is not text")
    if kind in ("str", "Path") and "\0" in str(value):
        raise ConfigError(f"{flag}: a NUL character cannot stand in it")
    return value


def _from_file(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: it has to hold settings by name, like `max_steps: 100`")
    fields: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(TrainConfig):
        fields[item.name] = item
        fields[flag_of(item)[2:].replace("-", "_")] = item
    values = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        flag = "--" + name.replace("_", "-")
        if flag in NOT_YET:
            raise ConfigError(f"--config {path}: {key}: {NOT_YET[flag]} is not in this release; leave it out")
        if name not in fields:
            raise ConfigError(f"--config {path}: unknown key {str(key)!r}.{_nearest(name, list(fields))}")
        if value is None and "None" in str(fields[name].type):
            continue
        values[fields[name].name] = _converted(fields[name], value)
    return values


def _positive(config: RunConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ConfigError(f"{_flag_named(config, name)}: {value} is not above 0")


def _at_least(config: RunConfig, name: str, least: float, why: str = "") -> None:
    value = getattr(config, name)
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{_flag_named(config, name)}: {value} is less than {least}{f': {why}' if why else ''}")


def _flag_named(config: RunConfig, name: str) -> str:
    return next(flag_of(item) for item in dataclasses.fields(config) if item.name == name)


if __name__ == "__main__":
    print(parse(sys.argv[1:]))
