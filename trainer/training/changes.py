"""Changes between the attempt that saved a checkpoint and the one that resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SETTINGS = {
    "precision": "precision",
    "micro_batch_size": "micro-batch size",
    "max_grad_norm": "maximum gradient norm",
    "deterministic": "deterministic algorithms",
}
"""Settings that change the arithmetic of a step, and their names in a message."""
MACHINE = {"device": "device", "instruction_set": "instruction set", "torch": "torch", "threads": "threads"}
"""Facts of the machine in a manifest, and their names in a message."""


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The facts that have changed and may affect the last bits of a result: {name: [old, new]}.

    Args:
        then: The facts of the checkpoint's manifest; a fact that it, or `now`, lacks has not changed.
        now: The facts that this attempt would write.
    """
    pairs = {"processes": (then.get("world_size"), now["world_size"])}
    for part, names in (("config", SETTINGS), ("machine", MACHINE)):
        for key, name in names.items():
            pairs[name] = (_mapping(then, part).get(key), _mapping(now, part).get(key))
    return {name: [old, new] for name, (old, new) in pairs.items() if None not in (old, new) and old != new}


def _mapping(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}


def sentence(step: int, changed: Mapping[str, list[Any]]) -> str:
    """One line that lists the changes."""
    listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
    return (
        f"Changed since step {step}: {listed}. From here on, results may not be bit-identical to an undisturbed run's."
    )


def machine_facts(threads: int | None = None) -> dict[str, Any]:
    """What a manifest says of the machine.

    Args:
        threads: Those that torch computed with; None: as many as now.
    """
    return {
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if threads is None else threads,
    }
