"""What a run is made of at a boundary, to JSON and tensors and back."""

import json

import pytest
import torch
from torch import nn

from trainer.checkpoint.optimizers import moved
from trainer.checkpoint.state import StateError, apply, collect, model_tensors
from trainer.checkpoint.values import decode, encode


def test_two_values_that_make_one_path_are_both_kept() -> None:
    value = {1: torch.tensor([1.0]), "1": torch.tensor([2.0]), "a.b": torch.tensor([3.0]), "a": {"b": torch.ones(1)}}
    tensors: dict[str, torch.Tensor] = {}
    back = decode(encode(value, "extra", tensors), tensors)
    assert len(tensors) == 4
    assert {key: back[key].item() for key in (1, "1", "a.b")} == {1: 1.0, "1": 2.0, "a.b": 3.0}
    assert back["a"]["b"].item() == 1.0


def test_a_tensor_of_a_type_that_cannot_be_saved_is_named() -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(StateError, match=r"model\.phase: torch\.complex64 cannot be saved"):
        collect(model, [], {})


def test_a_table_that_is_made_anew_and_cannot_be_saved_is_left_out() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("rotations", torch.ones(3, dtype=torch.complex64), persistent=False)
    model.register_buffer("positions", torch.ones(3), persistent=False)
    assert sorted(model_tensors(model)) == ["model.bias", "model.weight"]
    model.register_buffer("kept", torch.ones(3, dtype=torch.complex64))
    with pytest.raises(StateError, match=r"model\.kept: torch\.complex64 cannot be saved"):
        collect(model, [], {})


def test_an_optimizers_nested_tensors_go_to_the_parameters_device() -> None:
    there = moved({"old": [torch.ones(2), (torch.ones(1), 3)], "count": 7}, torch.device("meta"))
    assert [there["old"][0].device.type, there["old"][1][0].device.type] == ["meta", "meta"]
    assert (there["old"][1][1], there["count"]) == (3, 7)


def test_an_optimizer_that_keeps_lists_of_tensors_comes_back() -> None:
    def trained(steps: int, model: nn.Linear, optimizer: torch.optim.LBFGS) -> None:
        for _ in range(steps):
            optimizer.step(lambda: loss(model))

    def loss(model: nn.Linear) -> torch.Tensor:
        model.zero_grad()
        value = (model(torch.arange(6.0).reshape(3, 2)) - 1).square().sum()
        value.backward()
        return value

    def made() -> tuple[nn.Linear, torch.optim.LBFGS]:
        torch.manual_seed(1)
        model = nn.Linear(2, 1)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    model, optimizer = made()
    trained(3, model, optimizer)
    live = collect(model, [optimizer], {"step": 3})
    tensors = {name: tensor.detach().clone() for name, tensor in live.tensors.items()}
    plain = json.loads(json.dumps(live.plain))
    again, other = made()
    apply(again, [other], tensors, plain)
    trained(2, model, optimizer)
    trained(2, again, other)
    assert torch.equal(model.weight, again.weight)
