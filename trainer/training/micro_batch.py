"""The micro-batch: as given, or `auto`: found by trying. Where memory runs out, it is halved on all ranks.

The global batch holds: a step has more micro-steps then. On a GPU the search begins with a rank's whole part of the
global batch; on a CPU, where a process that takes too much memory is killed instead of told, with the default size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from trainer.attempt.history import ended
from trainer.attempt.record import Attempt
from trainer.errors import RunError, TrainerError
from trainer.layout.events import read_events
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.names import list_attempts
from trainer.training.config import AUTO, DEFAULT_MICRO_BATCH_SIZE


class OutOfMemoryError(TrainerError):
    """Memory ran out where the other ranks cannot be told in time: the next attempt begins with half the size."""

    code = EXIT_PREEMPTED


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that a device or this machine has no memory left; whatever library raised it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def largest(whole: int, limit: int) -> int:
    """The largest divisor of the global batch up to a limit."""
    return next(size for size in range(min(whole, max(1, limit)), 0, -1) if whole % size == 0)


def smaller(whole: int, size: int) -> int:
    """The next size to try: the largest divisor of the global batch up to half the size.

    Raises:
        RunError: there is none.
    """
    if size == 1:
        raise RunError(
            "out of memory with a micro-batch of one sample. Use a GPU with more memory, shorter samples (--seq-len), "
            "or --precision bf16"
        )
    return largest(whole, size // 2)


def first_size(whole: int, ranks: int, device: str, facts: Mapping[str, Any], too_large: int | None) -> list[int]:
    """The size to begin with; and 1 if the newest checkpoint was saved with it on machines like these, else 0.

    Args:
        whole: The global batch.
        ranks: Their number.
        device: Its kind, as manifests name it.
        facts: Those of the newest checkpoint's manifest; empty if there is none.
        too_large: A size that did not fit in the attempt before; None if that attempt ended for another reason.
    """
    settings, machine = facts.get("config"), facts.get("machine")
    saved = settings.get("micro_batch_size") if isinstance(settings, Mapping) else None
    there = machine.get("device") if isinstance(machine, Mapping) else None
    is_same = (there, facts.get("world_size")) == (device, ranks)
    if type(saved) is int and saved > 0 and whole % saved == 0 and is_same and too_large is None:
        return [saved, 1]
    size = largest(whole, DEFAULT_MICRO_BATCH_SIZE if device == "cpu" else -(-whole // ranks))
    return [smaller(whole, too_large) if too_large is not None and too_large <= size else size, 0]


def too_large_before(attempt: Attempt) -> int | None:
    """Rank 0: the micro-batch that did not fit into memory where the attempt before this one ended because of that.

    Raises:
        OSError: the bucket fails.
    """
    before = [name for name in list_attempts(attempt.paths) if name < attempt.name]
    events = read_events(attempt.paths, max(before), ("end",)) if before else []
    size = ended(events).get("micro_batch_too_large")
    return size if type(size) is int and size > 0 else None


def given(config_value: int | str) -> int | None:
    """The size that was given; None if it is to be found."""
    return None if config_value == AUTO else int(config_value)
