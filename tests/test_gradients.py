"""Gradients: clipped or not, dense or sparse."""

from pathlib import Path

import one_rank
import pytest
import torch
from support import column, weights
from torch import nn


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
