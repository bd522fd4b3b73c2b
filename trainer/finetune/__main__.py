"""Train or fine-tune a causal language model so that a preemption costs seconds, not the run.

    python -m trainer --checkpoint-dir runs/first --model tiny --data stdlib

The launcher starts this program once per accelerator. It reads top to bottom: settings, data, model, training. The
exact resume is the work of trainer.training.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.errors import RunError
from trainer.finetune.config import TrainConfig, parse
from trainer.training.config import ConfigError
from trainer.training.run import SpotRun

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn


class PackedSamples:
    """Rows of token ids of one length, as batches for a causal language model."""

    def __init__(self, rows: np.ndarray) -> None:
        """Wrap the rows, (samples, seq_len)."""
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids: np.ndarray) -> torch.Tensor:
        """Token ids (len(ids), seq_len), int64."""
        import numpy as np
        import torch

        return torch.from_numpy(self.rows[ids].astype(np.int64))

    def weight(self, batch: torch.Tensor) -> int:
        """The number of predicted tokens: all but the first of each row."""
        return int(batch[:, 1:].numel())


def loss_sum(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token cross-entropies over a batch of token ids (samples, seq_len)."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=tokens).logits[:, :-1].float()
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="sum")


def main(argv: list[str] | None = None) -> None:
    """Run one rank. Never returns: the process ends with an exit code of README's table."""
    # 1. Settings, from the command line and --config.
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = parse(arguments)
    except ConfigError as error:
        sys.exit(f"Error: {error}")

    run = SpotRun(config, config.binding())
    run.unwinds = False  # Nothing follows the block.
    run.is_same = lambda name, first: name == "model" and is_moved(config.model, first)
    with run:
        from trainer.finetune import model as models
        from trainer.finetune import tokens as prepared
        from trainer.finetune.inputs import Inputs
        from trainer.training.rng import seed_all
        from trainer.training.schedule import lr_factor

        # 2. Data and model files. Rank 0 chooses them and packs the data once per run, into the bucket. Each machine
        # then makes one copy on its disk, which its ranks share.
        stack = ExitStack()
        inputs = Inputs(run, config, stack) if run.rank == 0 else None
        chosen = run.rank0_does("inputs", lambda: inputs and inputs.choose())
        run.config = config = replace(config, seq_len=chosen["seq_len"], grace_s=run.grace_s)
        tokens = prepared.on_this_machine(run, chosen["tokens"], stack, inputs.local if inputs else None)
        files = models.on_this_machine(run, config.model, chosen["model_revision"], inputs.model if inputs else None)
        samples = PackedSamples(tokens.train)
        if len(samples) < config.global_batch_size:
            raise RunError(
                f"{config.data}: only {len(samples)} samples, fewer than one batch of {config.global_batch_size}"
            )
        done, consumed = run.rank0_does("consumed", lambda: consumed_by(run))
        max_steps = config.steps_for(len(samples), done, consumed)
        warmup_steps = config.warmup_for(max_steps)

        # 3. Model and optimizer: the same initial weights on every rank, from the seed.
        seed_all(config.seed)
        model = models.build_model(config, tokens.vocab_size, files)
        if note := models.check_fit(model, config, tokens):
            run.print_line(note)
        model.train()
        optimizer = make_optimizer(model, config)

        # 4. Training: restore the newest checkpoint, train to the last step, export the model.
        run.train(
            model,
            optimizer,
            samples=samples,
            held_out=PackedSamples(tokens.held_out),
            loss=loss_sum,
            max_steps=max_steps,
            lr_factor=lambda step: lr_factor(
                step, schedule=config.lr_schedule, warmup_steps=warmup_steps, max_steps=max_steps
            ),
            save_model=lambda trained, path, write: models.save_model(trained, config, path, write, files),
            tokens=chosen["tokens"],
        )


def consumed_by(run: SpotRun) -> tuple[int, int]:
    """Rank 0: the steps done and the samples consumed in them, from the newest checkpoint."""
    facts = run.newest.facts if run.newest else {}
    done, samples = facts.get("step"), facts.get("samples")
    return (done, samples) if type(done) is int and type(samples) is int else (0, 0)


def is_moved(model: str, first: Mapping[str, Any]) -> bool:
    """True if the model's folder is the one that the run began with, under another path."""
    from trainer.finetune.model import fingerprint

    recorded = first.get("model_files")
    return recorded is not None and recorded == fingerprint(model)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; no weight decay on vectors (norms, biases)."""
    import torch

    parameters: list[Any] = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


if __name__ == "__main__":
    main()
