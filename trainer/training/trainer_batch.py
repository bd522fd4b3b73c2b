"""The global batch of Hugging Face's Trainer: a step has the same number of samples on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_global_batch(args: Any, first: object, print_line: Callable[[str], None]) -> int:
    """Accumulate over as many batches as a step of the run's size has; returns the samples of a step here.

    Args:
        args: The TrainingArguments; `gradient_accumulation_steps` is changed where that keeps the size of a step.
        first: The samples of a step when the run was started; None: there is no earlier attempt.
        print_line: Prints a line.
    """
    at_once = args.train_batch_size * args.world_size
    if type(first) is int and first % at_once == 0 and first // at_once != args.gradient_accumulation_steps:
        args.gradient_accumulation_steps = first // at_once
        print_line(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps} now, so that a step has {first} "
            f"samples on {args.world_size} processes too, and the learning rate stays right"
        )
    return int(at_once * args.gradient_accumulation_steps)


def batch_remedy(args: Any, first: int) -> str:
    """How to have steps of the run's size again, for a message.

    Args:
        args: The TrainingArguments.
        first: The samples of a step when the run was started.
    """
    share, rest = divmod(first, args.world_size)
    if rest:
        return f"run on a number of processes that divides {first} (per_device_train_batch_size cannot be below 1)"
    fits = max(size for size in range(1, args.per_device_train_batch_size + 1) if share % size == 0)
    return f"set per_device_train_batch_size={fits} (its product with the number of processes must divide {first})"
