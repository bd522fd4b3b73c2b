"""The model: a tiny Llama built from a config, or any causal language model that transformers can load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import scratch

if TYPE_CHECKING:
    from torch import nn

    from trainer.config import TrainConfig
    from trainer.export import Write


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

    with _loading(config.model):
        # In fp32 whatever it was saved in: --precision says what the arithmetic is done in.
        model: nn.Module = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return _without_cache(model)


def _without_cache(model: Any) -> nn.Module:
    """The model, told to keep no cache of keys and values, which training has no use for; the export undoes it."""
    model.cache_before_training = getattr(model.config, "use_cache", None)
    if model.cache_before_training is not None:
        model.config.use_cache = False
    return model  # type: ignore[no-any-return]


@contextmanager
def _loading(name: str, what: str = "") -> Iterator[None]:
    """Says in a line what is wrong with files that cannot be loaded.

    A file that was cut or damaged fails with whatever its reader raises: any exception counts, but a lack of memory.

    Raises:
        ModelError: it cannot be loaded.
        ScratchError: the disk that the hub's files go to is full.
    """
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if (isinstance(error, OSError) and error.errno in scratch.FULL) or "No space left on device" in str(error):
            from huggingface_hub import constants

            raise scratch.full(Path(constants.HF_HUB_CACHE)) from None
        told = isinstance(error, (OSError, ValueError, ImportError)) and not isinstance(error, json.JSONDecodeError)
        hint = "" if told else (
            f" ({type(error).__name__}). A file of it may be cut or damaged: "
            + ("copy the folder again" if Path(name).is_dir() else "delete it from the hub's cache, to load it again")
        )  # fmt: skip
        raise ModelError(f"--model {name}: {what}{_first_line(error)}{hint}") from None


def _tiny(vocab_size: int, seq_len: int) -> nn.Module:
    """A Llama of about a million parameters. Dropout is on: without it a wrong random number would go unnoticed."""
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    model = LlamaForCausalLM(
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
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return _without_cache(model)


def load_tokenizer(config: TrainConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with _loading(config.model, "its tokenizer: "):
        return AutoTokenizer.from_pretrained(config.model)


def save_model(model: Any, config: TrainConfig, folder: Path, write: Write | None = None) -> None:
    """Write the model, and its tokenizer where it has one, so that `from_pretrained` loads them.

    The weights are streamed through `write`, where it is given: no local disk has to hold them.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = getattr(model, "cache_before_training", None)
    if before is not None:
        model.config.use_cache = before
    with _streamed(folder, write):
        model.save_pretrained(folder)
    if config.model != "tiny":
        load_tokenizer(config).save_pretrained(folder)


@contextmanager
def _streamed(folder: Path, write: Write | None) -> Iterator[None]:
    """Has save_pretrained write its safetensors files through `write`: it knows best which tensors go into which."""
    from transformers import modeling_utils

    real = getattr(modeling_utils, "safe_save_file", None)
    if write is None or real is None:  # A release that writes in another way: then on local disk.
        yield
        return

    def save(tensors: Mapping[str, Any], path: str, metadata: Mapping[str, str] | None = None) -> None:
        write(Path(path).relative_to(folder).as_posix(), tensors, metadata)

    modeling_utils.safe_save_file = save
    try:
        yield
    finally:
        modeling_utils.safe_save_file = real


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
