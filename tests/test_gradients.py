"""Gradients: clipped or not, dense or sparse, of a checkpointed part."""

from pathlib import Path

import one_rank
import pytest
import torch
import torch.distributed as dist
from support import column, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.finetune.config import parse
from trainer.training import buckets


class Bag(nn.Module):
    """A model most of whose weights have sparse gradients."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, sparse=sparse)
        self.out = nn.Linear(4, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.out(self.table((batch[:, :4] * 10).long().clamp(-25, 24) + 25).mean(1))


def bag_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch).squeeze(1) - batch[:, 4]).square().sum()


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_sparse_gradients_give_what_dense_ones_give(tmp_path: Path, limit: float) -> None:
    for sparse in (True, False):
        left = one_rank.train(
            tmp_path / str(sparse), model=lambda sparse=sparse: Bag(sparse), loss=bag_loss, max_grad_norm=limit
        )
        assert left.code == 0, left.error
    norms = {sparse: column(tmp_path / str(sparse), "grad_norm") for sparse in (True, False)}
    assert norms[True] == pytest.approx(norms[False], rel=1e-5)
    assert (norms[True][0] > limit) or not limit
    ours, dense = (
        {name: torch.frombuffer(bytearray(data), dtype=torch.float32) for name, data in weights(found).items()}
        for found in (tmp_path / "True", tmp_path / "False")
    )
    for name in dense:
        assert torch.allclose(ours[name], dense[name], atol=1e-6), name


def test_gradients_are_clipped_to_a_norm_of_1_unless_another_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    first = [value.detach().clone() for value in nn.Linear(4, 1).parameters()]
    left = one_rank.train(
        tmp_path / "run", max_steps=1, loss=lambda model, batch: 100 * one_rank.squares(model, batch),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    )  # fmt: skip
    assert left.code == 0, left.error
    assert column(tmp_path / "run", "grad_norm")[0] > 1
    trained = {name.rpartition(".")[2]: data for name, data in weights(tmp_path / "run").items()}
    moved = [
        torch.frombuffer(bytearray(trained[name]), dtype=torch.float32) - before.flatten()
        for name, before in zip(("weight", "bias"), first, strict=True)
    ]
    assert float(torch.cat(moved).norm()) == pytest.approx(0.5 * 1.0, rel=1e-4)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--max-grad-norm X clip gradients to this norm; 0: do not clip (default: 1.0)" in told
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert "Gradients are clipped to a norm of 1.0; `max_grad_norm` changes that (0: never clip)." in readme


class Checkpointed(nn.Module):
    """A part without parameters is computed again in the backward pass."""

    def __init__(self, is_reentrant: bool) -> None:
        super().__init__()
        self.out, self.is_reentrant, self.passes = nn.Linear(2, 1), is_reentrant, 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return checkpoint(torch.tanh, self.out(batch), use_reentrant=self.is_reentrant)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_first_pass_that_is_thrown_away_does_not_disturb_a_checkpointed_module(is_reentrant: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Checkpointed(is_reentrant)
        ddp = nn.parallel.DistributedDataParallel(model)
        buckets.settle_at_first_pass(ddp)
        ddp(torch.ones(3, 2)).sum().backward()
        assert model.passes == 2
        assert model.out.weight.grad is not None
    finally:
        dist.destroy_process_group()
