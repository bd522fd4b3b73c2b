"""Hugging Face's Trainer and TRL's, in the ways that people use them; it strikes itself at a step.

python -m trainer.launch tests/programs/hf.py --dir FOLDER --strike 7:SIGKILL
"""

from trainer import SpotRun  # isort: skip

import argparse
import dataclasses
import json
import os
import random
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from cut_on_cpu import cut_on_cpu
from no_time import no_time
from own_loop import strike
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from trainer.checkpoint.shards import is_cut
from trainer.hf import SpotCallback

VOCABULARY = 40


class Items(Dataset):
    def __init__(self, count: int) -> None:
        self.ids = torch.randint(0, VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def masking(items: list[dict]) -> dict:
    """A batch in which random tokens are replaced: for masked language modelling, for example."""
    ids = torch.stack([item["input_ids"] for item in items])
    hidden = (torch.rand(ids.shape) < 0.3) | (torch.from_numpy(np.random.rand(*ids.shape)) < 0.1)
    return {"input_ids": ids.masked_fill(hidden, random.randrange(VOCABULARY)), "labels": ids}


class Striker(TrainerCallback):
    """Strikes this process before a step, or at an evaluation's first batch."""

    def __init__(self, run: SpotRun, given: str, evaluation: int) -> None:
        step, _, self.name = given.partition(":")
        self.run, self.step, self.evaluation = run, int(step), evaluation

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step + 1 == self.step and state.is_world_process_zero:
            strike(self.run, self.name)

    def on_prediction_step(self, args, state, control, **_) -> None:
        if state.global_step == self.evaluation and state.is_world_process_zero:
            self.evaluation = -1
            os.kill(os.getpid(), signal.SIGTERM)


def make_model(dropout: float) -> LlamaForCausalLM:
    transformers.set_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, attention_dropout=dropout, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip


def arguments(given: argparse.Namespace, kind: type = TrainingArguments, **more):
    if given.fsdp is not None:  # Early releases of transformers 5 take this one of fsdp_config from there.
        os.environ["FSDP_STATE_DICT_TYPE"] = given.fsdp.get("state_dict_type", "FULL_STATE_DICT")
    args = kind(
        output_dir=str(Path(given.dir).parent / "output"), use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=given.batch, gradient_accumulation_steps=given.accumulate, seed=5,
        max_steps=given.until, num_train_epochs=given.epochs, learning_rate=1e-2, lr_scheduler_type="cosine",
        warmup_steps=2, logging_steps=given.log, save_strategy="no", eval_strategy=given.evaluate,
        eval_steps=3, per_device_eval_batch_size=4, metric_for_best_model="loss" if given.patience else None,
        greater_is_better=False if given.patience else None, dataloader_num_workers=given.workers,
        dataloader_persistent_workers=given.workers > 0,
        **({"fsdp": "full_shard", "fsdp_config": {"version": 2, **given.fsdp}} if given.fsdp is not None else {}),
        **more,
    )  # fmt: skip
    if given.fsdp is not None:
        cut_on_cpu()
    return args


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<end>", "<pad>", "</s>", *(f"w{number}" for number in range(VOCABULARY - 3))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")


def make_dpo(given: argparse.Namespace, callbacks: list[TrainerCallback]) -> Trainer:
    from datasets import Dataset as Table
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": f"w{row} w1", "chosen": f" w{row + 2} w3", "rejected": f" w{row + 1} w2 w5"}
        for row in range(given.count)
    ]
    args = arguments(given, DPOConfig, bf16=False, max_length=16)
    return DPOTrainer(
        make_model(0.1), make_model(0.0), args, train_dataset=Table.from_list(rows),
        eval_dataset=Table.from_list(rows[:9]), processing_class=make_tokenizer(), callbacks=callbacks,
    )  # fmt: skip


def make_sft(given: argparse.Namespace, callbacks: list[TrainerCallback]) -> Trainer:
    from datasets import Dataset as Table
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"w{row} w1", "completion": f" w{row + 2} w3 w{row + 4}"} for row in range(given.count)]
    args = arguments(given, SFTConfig, bf16=False, max_length=16)
    adapter = LoraConfig(r=2, lora_dropout=0.1, task_type="CAUSAL_LM") if given.lora else None
    return SFTTrainer(
        make_model(0.1), args, train_dataset=Table.from_list(rows), eval_dataset=Table.from_list(rows[:9]),
        processing_class=make_tokenizer(), peft_config=adapter, callbacks=callbacks,
    )  # fmt: skip


def make_seq2seq(given: argparse.Namespace, callbacks: list[TrainerCallback]) -> Trainer:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    transformers.set_seed(3)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    return Seq2SeqTrainer(
        T5ForConditionalGeneration(config), arguments(given, Seq2SeqTrainingArguments, predict_with_generate=True),
        train_dataset=Items(given.count), eval_dataset=Items(9), callbacks=callbacks,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir")
    parser.add_argument("--trainer", default="trainer")
    parser.add_argument("--until", type=int, default=-1)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--count", type=int, default=13)
    parser.add_argument("--log", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--evaluate", default="no")
    parser.add_argument("--patience", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--strike", default="0:SIGTERM")
    parser.add_argument("--strike-in-evaluation", type=int, default=-1)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--fsdp", type=json.loads, nargs="?", const={}, help="cut the model; more of fsdp_config")
    parser.add_argument("--masks", action="store_true", help="the collator draws random numbers")
    parser.add_argument("--grouped", action="store_true", help="by length")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--mistake", default="")
    parser.add_argument("--no-time", action="store_true", help="a stop never leaves time for the rest of a step")
    given = parser.parse_args()
    model = make_model(0.0 if given.no_dropout else 0.1)
    if given.mistake == "another base":
        model.lm_head.weight.data += 1
    if given.lora and given.trainer == "trainer":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, task_type="CAUSAL_LM"))
    options: dict = {}
    if given.grouped:
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        by_name = {"train_sampling_strategy": "group_by_length"}
        options = by_name if by_name.keys() <= names else {"group_by_length": True}
    with no_time() if given.no_time else nullcontext(), SpotRun(given.dir, save_every=given.save_every) as run:
        callbacks = (
            [] if given.mistake == "no callback" else [SpotCallback(run, **({"exact": True} if given.exact else {}))]
        )
        callbacks.append(Striker(run, given.strike, given.strike_in_evaluation))
        if given.mistake == "nan":
            model.lm_head.weight.data.fill_(float("nan"))
        if given.patience:
            callbacks.append(EarlyStoppingCallback(given.patience))
        if given.trainer != "trainer":
            trainer = {"dpo": make_dpo, "sft": make_sft, "seq2seq": make_seq2seq}[given.trainer](given, callbacks)
        else:
            trainer = Trainer(
                model, arguments(given, **options), train_dataset=Items(given.count), eval_dataset=Items(9),
                callbacks=callbacks, data_collator=masking if given.masks else None,
            )  # fmt: skip
        resume = None if given.mistake == "no resume" else run.resume_from()
        done = trainer.train(resume_from_checkpoint=resume)
        assert all(is_cut(parameter) == (given.fsdp is not None) for parameter in trainer.model.parameters())
        run.finish()
    if run.rank == 0:
        history = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
        for line in history:
            print("logged", line["step"], line.get("loss"), line.get("eval_loss"))
        print("transformers", transformers.__version__)
        print(f"after the block: step {run.step} {trainer.state.global_step} {done.training_loss!r}", flush=True)
        if Path(trainer.args.output_dir).exists():
            print("in output_dir:", *(path.name for path in Path(trainer.args.output_dir).iterdir()))


if __name__ == "__main__":
    main()
