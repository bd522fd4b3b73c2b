"""Cut models: in which ways Hugging Face's Trainer may cut a model, so that it can be resumed."""

from __future__ import annotations

from typing import Any

from trainer import check


def unsupported_cut(trainer: Any) -> str:
    """What a Trainer cuts its model with, and the remedy, if that cannot be resumed; else empty."""
    remedy = 'use FSDP2, with fsdp_config={"version": 2}'
    if trainer.is_deepspeed_enabled or trainer.args.deepspeed:  # On CPUs it may be left out, though asked for.
        return f"DeepSpeed: {remedy}"
    if not trainer.is_fsdp_enabled:
        return ""
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 1:
        return f"FSDP1: {remedy}"
    # It asks a new optimizer, which has no state yet, what to load. See huggingface/accelerate, issue 3971.
    if "SHARDED" in str(plugin.state_dict_type) and check.installed("accelerate") < (1, 13):
        return (
            "FSDP2's SHARDED_STATE_DICT with accelerate below 1.13, which does not restore the optimizer from it: "
            "pip install 'accelerate>=1.13,<2', or set FSDP_STATE_DICT_TYPE=FULL_STATE_DICT"
        )
    return ""
