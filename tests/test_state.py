"""What a run is made of at a boundary, to JSON and tensors and back."""

import pytest
import torch

from trainer.state import StateError, collect, decode, encode


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
