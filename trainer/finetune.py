"""Train or fine-tune a causal language model so that a preemption costs seconds, not the run.

    python -m trainer --checkpoint-dir runs/first --model tiny --data stdlib

The launcher starts this program once per accelerator. It reads top to bottom: settings, data, model, training. What
makes it resume exactly is in run.py and loop.py.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from trainer.config import ConfigError, TrainConfig, parse
from trainer.run import RunError, SpotRun  # Before torch: from here on a SIGTERM is heard.

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
        """How many tokens are predicted: all but the first of each row."""
        return int(batch[:, 1:].numel())


def loss_sum(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token cross-entropies over a batch of token ids (samples, seq_len)."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=tokens).logits[:, :-1].float()
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="sum")


def main(argv: list[str] | None = None) -> None:
    """Run one rank. Never returns: the process ends with an exit code of the stop table."""
    # 1. Settings, from the command line and --config.
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = parse(arguments)
    except ConfigError as error:
        sys.exit(f"Error: {error}")

    with SpotRun(config, config.binding()) as run:
        from trainer import data
        from trainer import model as models
        from trainer.rng import seed_all
        from trainer.schedule import lr_factor

        # 2. Data: packed once per run, on rank 0, into the bucket; then read from a local copy.
        folder = run.rank0_does("tokens", lambda: prepared_tokens(run, config))
        tokens = run.ask(lambda: data.open_tokens(run.paths, folder, between=run.between), math.inf)
        samples = PackedSamples(tokens.train)
        if len(samples) < config.global_batch_size:
            raise RunError(
                f"{config.data}: {len(samples)} samples are fewer than a batch of {config.global_batch_size}"
            )
        max_steps = config.steps_for(len(samples))
        warmup_steps = config.warmup_for(max_steps)

        # 3. Model and optimizer: the same initial weights on every rank, from the seed.
        seed_all(config.seed)
        model = models.build_model(config, tokens.vocab_size)
        model.train()
        optimizer = make_optimizer(model, config)

        # 4. Train: restores what the last attempt left, goes on to the last step, exports.
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
            save_model=lambda trained, path, write: models.save_model(trained, config, path, write),
            tokens=folder,
        )


def prepared_tokens(run: SpotRun, config: TrainConfig) -> str:
    """Rank 0: the folder of packed samples, the one that the newest checkpoint names or a new one."""
    from trainer import data

    assert run.attempt
    named = run.newest.facts.get("tokens") if run.newest else None
    kept = named if isinstance(named, str) and run.ask(lambda: data.is_whole(run.paths, named)) else None
    try:
        key = data.data_key(config)
    except data.DataError as error:
        if kept is None:
            raise
        run.say(f"{error}. The run goes on with the data that was prepared for it.")
        return kept
    run.bind(data_key=key)
    if kept and kept.startswith(key):
        return kept
    attempt = run.attempt.name
    return str(run.ask(lambda: data.prepare(run.paths, attempt, config, run.between), math.inf))


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
