"""What TRL's trainers count for their logs, outside of any checkpoint of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def save(trainer: Any) -> dict[str, Any]:
    """Their counts; empty for other trainers."""
    metrics = getattr(trainer, "_metrics", None)
    if not isinstance(metrics, Mapping) or not hasattr(trainer, "_total_train_tokens"):
        return {}
    return {"tokens": trainer._total_train_tokens, "metrics": dict(metrics.get("train", {}))}


def load(trainer: Any, counts: Mapping[str, Any]) -> None:
    """Let a trainer of TRL's go on with what it counted."""
    if counts and save(trainer):
        trainer._total_train_tokens = counts["tokens"]
        trainer._metrics["train"].update(counts["metrics"])
