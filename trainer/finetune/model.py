"""The model: a tiny Llama built here, or any causal language model that transformers can load."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.bucket.deadlines import within
from trainer.errors import TrainerError, first_line
from trainer.finetune import hub
from trainer.machine import scratch

if TYPE_CHECKING:
    from torch import nn

    from trainer.finetune.config import TrainConfig
    from trainer.finetune.tokens import Tokens
    from trainer.training.export import Write
    from trainer.training.run import SpotRun

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


class ModelError(TrainerError):
    """The model or its tokenizer cannot be loaded; the message names the reason and the remedy."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model on this machine."""

    folder: str | None
    """None for the tiny model, which has no files."""
    revision: str | None = None
    """Their commit on the Hub."""


def find_model(name: str, revision: str | None, check_stop: Callable[[], None] = lambda: None) -> ModelFiles:
    """Find the files of a model: `tiny`, a folder, or an id of the Hub, whose files are downloaded.

    Args:
        name: The value of --model.
        revision: The commit of a model of the Hub; None for the newest.
        check_stop: Called while downloading; raises to stop.

    Raises:
        ModelError: there is no such folder.
        HubError: the model cannot be downloaded.
    """
    if name == "tiny":
        return ModelFiles(None)
    try:
        with within("looking at the model", where=Path(name)):
            if Path(name).is_dir():
                return ModelFiles(name)
            is_there = Path(name).exists()
    except OSError as error:
        raise ModelError(f"--model {name}: {error.strerror}") from None
    if is_there:
        raise ModelError(f"--model {name}: not a folder. Name the folder that holds its config.json")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"--model {name}: no such folder on this machine. Mount it, or name a model of the Hugging Face Hub"
        )
    folder = hub.download(
        hub.Repository(name, "model", revision),
        choose=hub.model_files,
        check_stop=check_stop,
        is_complete=hub.has_model,
    )
    return ModelFiles(str(folder), folder.name)


def on_this_machine(run: SpotRun, name: str, revision: str | None, found: ModelFiles | None) -> ModelFiles:
    """Download the files of a model once per machine; `found` are the files that rank 0 has already."""

    def folder() -> str | None:
        return (found or find_model(name, revision, run.check_stop)).folder

    return ModelFiles(run.group.machine_does("model", folder, run.check_stop), revision)


def fingerprint(name: str) -> str | None:
    """A hash that recognizes a model's folder under another path: of its small files and its weights' names and sizes.

    None if it is not a folder or cannot be read now.
    """
    with suppress(OSError), within("looking at the model", where=Path(name)):
        if name != "tiny" and Path(name).is_dir():
            found = hashlib.sha256()
            for path in sorted(Path(name).iterdir()):
                if path.name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                    found.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
                elif path.suffix in (".safetensors", ".bin", ".model", ".txt"):
                    found.update(f"{path.name} {path.stat().st_size}\n".encode())
            return found.hexdigest()[:16]
    return None


def seq_len_for(config: TrainConfig, files: ModelFiles) -> int:
    """The tokens per sample: as given; by default no more than the model has positions.

    Raises:
        ModelError: the model's config.json cannot be read.
    """
    if config.seq_len is not None or config.model == "tiny":
        return config.tokens_per_sample
    from transformers import AutoConfig

    with _loading(config.model):
        known = getattr(AutoConfig.from_pretrained(_place(config, files)), "max_position_embeddings", None)
    if isinstance(known, int) and known >= 2:
        return min(known, config.tokens_per_sample)
    return config.tokens_per_sample


def check_fit(model: Any, config: TrainConfig, tokens: Tokens) -> str | None:
    """Refuse a model that the samples do not fit, before the first step; returns a note for the user.

    Raises:
        ModelError: samples are longer than the model's table of positions, or token ids exceed its embedding.
    """
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and tokens.vocab_size > rows and (highest := tokens.highest_id()) >= rows:
        raise ModelError(
            f"--model {config.model}: its embedding has {rows} rows, and the data has token ids up to {highest}. Use "
            f"the model's own tokenizer, or save the model after model.resize_token_embeddings({tokens.vocab_size})"
        )
    known = getattr(model.config, "max_position_embeddings", None)
    seq_len = config.tokens_per_sample
    if not isinstance(known, int) or seq_len <= known:
        return None
    # Some tables have a few more rows than positions (OPT has two).
    learned = [
        table for name, table in model.named_modules()
        if table is not embedding and known <= getattr(table, "num_embeddings", 0) <= known + 8
        and ("pos" in name or name.endswith("wpe"))
    ]  # fmt: skip
    if learned:
        raise ModelError(
            f"--seq-len {seq_len} is more than the {known} positions of --model {config.model}. "
            f"Pass --seq-len {known} or less"
        )
    return f"--seq-len {seq_len} is more than the {known} positions that --model {config.model} was trained with"


def build_model(config: TrainConfig, vocab_size: int, files: ModelFiles | None = None) -> nn.Module:
    """Build the model with its initial weights: `tiny`, a folder, or a Hub id.

    Args:
        config: Names the model.
        vocab_size: The vocabulary size of the tiny model.
        files: The files of the model; None: at the config's path.

    Raises:
        ModelError: the model cannot be loaded.
    """
    if config.model == "tiny":
        return _tiny(vocab_size, config.tokens_per_sample)
    import torch
    from transformers import AutoModelForCausalLM

    with _loading(config.model):
        # The weights are fp32 whatever they were saved in; --precision sets the precision of the computation.
        model: nn.Module = AutoModelForCausalLM.from_pretrained(_place(config, files), dtype=torch.float32)
    return _without_cache(model)


def _without_cache(model: Any) -> nn.Module:
    """Switch off the cache of keys and values, which training does not use; the export switches it on again."""
    model.cache_before_training = getattr(model.config, "use_cache", None)
    if model.cache_before_training is not None:
        model.config.use_cache = False
    return model  # type: ignore[no-any-return]


@contextmanager
def _loading(name: str, what: str = "") -> Iterator[None]:
    """Turn errors of loading into one line.

    A damaged file fails with whatever its reader raises, so any exception counts, except for a lack of memory.

    Raises:
        ModelError: the files cannot be loaded.
        ScratchError: the disk of the Hub's cache is full.
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
        is_json = isinstance(error, json.JSONDecodeError)
        is_explained = isinstance(error, (OSError, ValueError, ImportError)) and not is_json
        hint = "" if is_explained else (
            f" ({type(error).__name__}). A file may be cut off or damaged: "
            + ("copy the folder again" if Path(name).is_dir() else "delete it from the Hub's cache and start again")
        )  # fmt: skip
        raise ModelError(f"--model {name}: {what}{first_line(error)}{hint}") from None


def _tiny(vocab_size: int, seq_len: int) -> nn.Module:
    """A Llama of about a million parameters. Dropout is on, so that a wrong random number shows in the results."""
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


def _place(config: TrainConfig, files: ModelFiles | None) -> str:
    return (files and files.folder) or config.model


def load_tokenizer(config: TrainConfig, files: ModelFiles | None = None) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    with _loading(config.model, "its tokenizer: "):
        return AutoTokenizer.from_pretrained(_place(config, files))


def save_model(
    model: Any, config: TrainConfig, folder: Path, write: Write | None = None, files: ModelFiles | None = None
) -> None:
    """Write the model and its tokenizer, if any, in the format that `from_pretrained` loads.

    If `write` is given, the weights are streamed through it and need no local disk.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = getattr(model, "cache_before_training", None)
    if before is not None:
        model.config.use_cache = before
    with _streamed(folder, write):
        model.save_pretrained(folder)
    if config.model != "tiny":
        load_tokenizer(config, files).save_pretrained(folder)


@contextmanager
def _streamed(folder: Path, write: Write | None) -> Iterator[None]:
    """Make save_pretrained write its safetensors files through `write`; it decides on the files' tensors."""
    from transformers import modeling_utils

    real = getattr(modeling_utils, "safe_save_file", None)
    if write is None or real is None:  # This release writes in another way: on local disk.
        yield
        return

    def save(tensors: Mapping[str, Any], path: str, metadata: Mapping[str, str] | None = None) -> None:
        write(Path(path).relative_to(folder).as_posix(), tensors, metadata)

    modeling_utils.safe_save_file = save
    try:
        yield
    finally:
        modeling_utils.safe_save_file = real
