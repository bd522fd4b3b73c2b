"""A small Llama trained on Python's own documentation with Hugging Face's Trainer."""

import os
import pydoc_data.topics
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

STEPS, LENGTH = int(os.environ.get("STEPS", "200")), 64

texts = list(pydoc_data.topics.topics.values())
pieces = Tokenizer(models.BPE())
pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
pieces.train_from_iterator(
    texts, trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<end>", pad_token="<end>")
ids = tokenizer("<end>".join(texts[:100]))["input_ids"]
blocks = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]

set_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    attention_dropout=0.1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config)
args = TrainingArguments(
    output_dir="output", max_steps=STEPS, per_device_train_batch_size=8, learning_rate=3e-3, warmup_steps=10,
    lr_scheduler_type="cosine", logging_steps=1, report_to="none", seed=0,
    save_steps=20, save_total_limit=2,
)  # fmt: skip
data = Dataset.from_dict({"input_ids": blocks})
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
trainer.train(resume_from_checkpoint=get_last_checkpoint("output") if Path("output").exists() else None)
trainer.save_model("model")
