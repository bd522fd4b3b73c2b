"""The model: a tiny Llama built from a config, or any causal language model that transformers can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from trainer.config import TrainConfig


class ModelError(Exception):
    """The model or its tokenizer cannot be loaded; the message says why and what to do."""


def build_model(config: TrainConfig, vocab_size: int) -> nn.Module:
    """The model with its initial weights: `tiny`, a folder, or a hub's id.

    Raises:
        ModelError: it cannot be loaded.
    """
    if config.model == "tiny":
        return _tiny(vocab_size, config.seq_len)
    import torch
    from transformers import AutoModelForCausalLM

    try:
        # In fp32 whatever it was saved in: --precision says what the arithmetic is done in.
        model: nn.Module = AutoModelForCausalLM.from_pretrained(config.model, use_cache=False, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {config.model}: {_first_line(error)}") from None
    return model


def _tiny(vocab_size: int, seq_len: int) -> nn.Module:
    """A Llama of about a million parameters. Dropout is on: without it a wrong random number would go unnoticed."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-vocab_size // 64) * 64,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=max(2048, seq_len),
            attention_dropout=0.1,
            attn_implementation="eager",
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def load_tokenizer(config: TrainConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {config.model}: its tokenizer: {_first_line(error)}") from None


def save_model(model: Any, config: TrainConfig, folder: Path) -> None:
    """Write the model, and its tokenizer where it has one, so that `from_pretrained` loads them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if config.model != "tiny":
        load_tokenizer(config).save_pretrained(folder)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
