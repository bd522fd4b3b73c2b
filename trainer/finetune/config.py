"""The settings of the bundled program, and its command line with --config.

Standard library and PyYAML only: `python -m trainer` reads them before it starts any process.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trainer.training.config import (
    AUTO,
    INPUT_BINDINGS,
    ConfigError,
    RunConfig,
    did_you_mean,
    flag_of,
    option,
    unknown_field,
)
from trainer.training.schedule import SCHEDULES

DEFAULT_MAX_STEPS = 60
DEFAULT_WARMUP_STEPS = 6
DEFAULT_SEQ_LEN = 128


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The settings that the bundled training program needs in addition."""

    max_steps: int | None = option(
        f"total number of optimizer steps (default: {DEFAULT_MAX_STEPS}, unless --epochs is given)",
        default=None,
        above=0,
    )
    model: str = option("tiny (a small built-in model), a model's folder, or a Hugging Face Hub id", default="tiny")
    data: str = option(
        "stdlib (Python's own source code), a folder or file of .txt or .jsonl (with a `text` field), also as .gz, "
        "or a Hugging Face Hub id",
        default="stdlib",
    )
    epochs: float | None = option("passes over the data, instead of --max-steps", default=None, above=0)
    seq_len: int | None = option(
        f"tokens per sample (default: {DEFAULT_SEQ_LEN}, or as many as the model has positions, if it has fewer)",
        default=None,
        at_least=2,
        reason="the first token of a sample is not predicted",
    )
    lr: float = option("peak learning rate", default=1e-3, above=0)
    lr_schedule: str = option("learning-rate schedule", default="cosine", choices=SCHEDULES)
    warmup_steps: int | None = option(
        f"steps until the peak learning rate (default: {DEFAULT_WARMUP_STEPS}, or all steps of a shorter run)",
        default=None,
        at_least=0,
    )
    weight_decay: float = option("AdamW weight decay, applied to matrices only", default=0.1, at_least=0)
    beta1: float = option("AdamW beta1", default=0.9)
    beta2: float = option("AdamW beta2", default=0.95)

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ConfigError: names the field, and a value that works.
        """
        super().__post_init__()
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ConfigError(f"--{name}: is empty; leave it out, or give a value")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name}: {getattr(self, name)} is not in [0, 1)")
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError("--epochs and --max-steps both set the length of the training: give one of them")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "max_steps", DEFAULT_MAX_STEPS)
        if self.max_steps is not None:
            self.warmup_for(self.max_steps)
        known = {item.name for item in dataclasses.fields(self)} | self.binding().keys() | INPUT_BINDINGS
        if problem := unknown_field(self.allow_config_change, known):
            raise ConfigError(problem)

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's betas."""
        return self.beta1, self.beta2

    @property
    def tokens_per_sample(self) -> int:
        """--seq-len, or its default before the model is known."""
        return DEFAULT_SEQ_LEN if self.seq_len is None else self.seq_len

    def binding(self) -> dict[str, Any]:
        """The settings that no later attempt may change: they decide each step's samples, learning rate and loss.

        A default --seq-len depends on the model; it is bound when the model is known (inputs.py).
        """
        names = (
            "model", "seq_len", "global_batch_size", "seed", "lr", "lr_schedule", "warmup_steps", "weight_decay",
            "beta1", "beta2", "max_grad_norm", "max_steps", "epochs",
        )  # fmt: skip
        found = {"optimizer": "adamw", **{name: getattr(self, name) for name in names}, **self._warmup()}
        return {name: value for name, value in found.items() if name != "seq_len" or value is not None}

    def to_json(self) -> dict[str, Any]:
        """The settings as they are recorded."""
        return {**super().to_json(), **self._warmup()}

    def _warmup(self) -> dict[str, int]:
        """The warm-up to record: the default itself, even in a shorter run, so that the run can be extended."""
        return {"warmup_steps": DEFAULT_WARMUP_STEPS if self.warmup_steps is None else self.warmup_steps}

    def warmup_for(self, max_steps: int) -> int:
        """The number of steps until the peak learning rate, in a run of `max_steps`.

        Raises:
            ConfigError: --warmup-steps is more than `max_steps`.
        """
        if self.warmup_steps is None:
            return min(DEFAULT_WARMUP_STEPS, max_steps)
        if self.warmup_steps > max_steps:
            end = f"--max-steps {max_steps}" if self.max_steps is not None else f"the {max_steps} steps of the run"
            raise ConfigError(f"--warmup-steps {self.warmup_steps} is more than {end}")
        return self.warmup_steps

    def steps_for(self, n_samples: int, done: int = 0, consumed: int = 0) -> int:
        """The last step of the training.

        Args:
            n_samples: The number of samples in the data.
            done: The number of steps that the run has done.
            consumed: The number of samples that those steps consumed. It differs from `done` steps of today's global
                batch size after that was changed.
        """
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        if consumed == done * self.global_batch_size:
            return max(1, math.ceil(self.epochs * n_samples / self.global_batch_size))
        return max(1, done, done + math.ceil((self.epochs * n_samples - consumed) / self.global_batch_size))


def parse(argv: Sequence[str]) -> TrainConfig:
    """Read the settings from a command line and its --config file; the command line wins.

    Raises:
        ConfigError: a user's mistake, in one or two lines.
    """
    parser = _parser()
    values = _parse_options(parser, argv)
    if path := values.pop("config", None):
        values = {**_parse_options(parser, _options_in(Path(path))), **values}
    if not values.get("checkpoint_dir"):
        raise ConfigError("--checkpoint-dir is missing; give the run's folder in the mounted bucket: /checkpoints/RUN")
    values["checkpoint_dir"] = Path(values["checkpoint_dir"])
    for name in ("allow_config_change", "report_to"):
        values[name] = tuple(values.get(name, ()))
    return TrainConfig(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainer",
        description="Train a causal language model on machines that may be preempted at any time; resume exactly.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read settings from a file; the command line wins")
    for item, kind, _ in _fields():
        help, how = item.metadata["help"], _ARGUMENTS[kind]
        if item.default not in (dataclasses.MISSING, None, ()) and kind is not bool:
            help += f" (default: {item.default})"
        if item.metadata["choices"]:
            how = {**how, "metavar": "|".join(item.metadata["choices"])}
        if kind is tuple:
            how = {"metavar": "FIELD", **how}
        if item.name == "save_interval_steps":
            how = {"type": _steps_or_auto, "metavar": "STEPS|auto"}
        if item.metadata["auto"]:
            how = {"type": _number_or_auto, "metavar": "N|auto"}
        parser.add_argument(flag_of(item), dest=item.name, help=help, **how)
    return parser


def _fields() -> list[tuple[dataclasses.Field[Any], type, bool]]:
    """The fields, each with the type of its value and whether a null in the file leaves it at its default."""
    hints = typing.get_type_hints(TrainConfig)
    found = []
    for item in dataclasses.fields(TrainConfig):
        hint = hints[item.name]
        is_optional = types.NoneType in typing.get_args(hint) or item.default is None
        if is_optional:
            hint = next((kind for kind in typing.get_args(hint) if kind is not types.NoneType), hint)
        found.append((item, typing.get_origin(hint) or hint, is_optional))
    return found


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _steps_or_auto(text: str) -> int | None:
    return None if text == "auto" else _whole_number(text)


def _number_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else _whole_number(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _text(text: str) -> str:
    if "\0" in text:
        raise argparse.ArgumentTypeError("the value contains a NUL character")
    return text


_ARGUMENTS: dict[type, dict[str, Any]] = {
    bool: {"action": "store_true"},
    tuple: {"action": "append"},
    int: {"type": _whole_number, "metavar": "N"},
    float: {"type": _number, "metavar": "X"},
    str: {"type": _text, "metavar": "TEXT"},
    Path: {"type": _text, "metavar": "FOLDER"},
}
"""argparse's keywords for a field of each type."""


def _parse_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The values that are given, by the name of their field."""
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].partition("=")[0]
        known = ["--config", "--help", *(flag_of(item) for item, *_ in _fields())]
        raise ConfigError(f"unknown option {word!r}.{did_you_mean(word, known)}")
    return vars(namespace)


def _options_in(path: Path) -> list[str]:
    """The settings of a --config file, as options of the command line."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(document, dict | None):
        raise ConfigError(f"--config {path}: the file must hold settings by name, like `max_steps: 100`")
    known = {}
    for item, kind, is_optional in _fields():
        known[item.name] = known[flag_of(item)[2:].replace("-", "_")] = flag_of(item), kind, is_optional
    options: list[str] = []
    for key, value in (document or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {path}: unknown key {str(key)!r}.{did_you_mean(name, known)}")
        flag, kind, is_optional = known[name]
        if value is not None or not is_optional:
            options += _as_options(flag, kind, value)
    return options


def _as_options(flag: str, kind: type, value: Any) -> list[str]:
    """A value of YAML, as options of the command line."""
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{flag}: {value!r} is neither true nor false")
        return [flag] if value else []
    if kind in (str, Path) and not isinstance(value, str):
        raise ConfigError(f"{flag}: {value!r} is not text")
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    return [f"{flag}={one}" for one in (value if kind is tuple and isinstance(value, list) else [value])]
