"""Supervised fine-tuning of a small Llama with TRL and a LoRA adapter, on Python's own documentation."""

import os
import pydoc_data.topics
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

STEPS = int(os.environ.get("STEPS", "200"))

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {letter: number for number, letter in enumerate(["<end>", *alphabet])}
letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", pad_token="<end>")
data = Dataset.from_list(
    [
        {"prompt": f"What does Python's help say about {topic}?\n", "completion": text[:80]}
        for topic, text in pydoc_data.topics.topics.items()
    ]
)

set_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config)  # Stands for a pretrained one.
adapter = LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
args = SFTConfig(
    output_dir="output", max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    learning_rate=1e-2, max_length=128, logging_steps=1, report_to="none", bf16=torch.cuda.is_available(),
    save_steps=20, save_total_limit=2,
)  # fmt: skip
trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
trainer.train(resume_from_checkpoint=get_last_checkpoint("output") if Path("output").exists() else None)
trainer.save_model("model")
