"""Frozen parameters of a pretrained base are left out of checkpoints, as long as nothing changes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import Attempts
from torch import nn
from torch.utils.data import DataLoader

from trainer import SpotRun
from trainer.checkpoint.frozen import Frozen
from trainer.checkpoint.state import State, StateError, apply, collect
from trainer.layout.names import RunPaths, list_checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model's folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16, vocab_size=32)).save_pretrained(folder)
    return folder


def base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def lora(folder: Path, seed: int = 0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    made = base(folder)
    torch.manual_seed(seed)
    model = get_peft_model(made, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.add_adapter("idle", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    return model


def state_of(model: nn.Module, frozen: Frozen) -> State:
    return collect(model, [], {}, base=frozen)


def test_a_checkpoint_of_a_lora_run_has_the_adapters_alone(saved: Path) -> None:
    model = lora(saved)
    frozen = Frozen(model)
    state = state_of(model, frozen)
    assert state.tensors
    assert all("lora_" in name for name in state.tensors), state.tensors.keys()
    assert any("idle" in name for name in state.tensors)  # Frozen, but drawn at random.
    assert len(state.plain["frozen"]["hashes"]) > 10
    assert state.plain["frozen"]["bases"] == [str(saved)]
    assert str(saved) in frozen.line
    other = lora(saved, seed=1)
    before = Frozen(other)
    apply(other, [], state.tensors, state.plain)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert state_of(other, before).tensors.keys() == state.tensors.keys()


def test_another_base_is_refused(saved: Path) -> None:
    model, other = lora(saved), lora(saved)
    state = state_of(model, Frozen(model))
    weight = next(parameter for name, parameter in other.named_parameters() if name.endswith("wte.weight"))
    weight.data[3, 3] += 1e-6
    with pytest.raises(StateError, match=r"wte.weight is frozen and not in the checkpoint, and differs .* of .*tiny"):
        apply(other, [], state.tensors, state.plain)


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "unfrozen": lambda weight: weight.requires_grad_(True),
    "trained and frozen again": lambda weight: weight.data.add_(0.1),
    "replaced": lambda weight: setattr(weight, "data", 0.999 * weight.data),
    "one element": lambda weight: weight.data.view(-1)[-1:].add_(1e-7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_without_gradients_or_is_trained_later_is_saved(saved: Path, change: str) -> None:
    model = base(saved).requires_grad_(False)
    frozen = Frozen(model)
    assert not state_of(model, frozen).tensors
    weight = model.transformer.ln_f.weight
    CHANGES[change](weight)
    state = state_of(model, frozen)
    assert list(state.tensors) == ["model.transformer.ln_f.weight"]
    again = base(saved).requires_grad_(False)
    before = Frozen(again)
    apply(again, [], state.tensors, state.plain)
    assert torch.equal(again.transformer.ln_f.weight, weight)
    # It is saved by the attempt that resumed, too, though it is frozen there.
    assert list(state_of(again, before).tensors) == ([] if change == "unfrozen" else list(state.tensors))


def test_a_frozen_module_without_a_pretrained_base_is_saved(saved: Path) -> None:
    model = nn.ModuleDict({"base": base(saved), "features": nn.Linear(3, 3)}).requires_grad_(False)
    assert {name.split(".")[1] for name in state_of(model, Frozen(model)).tensors} == {"features"}
    fresh = type(base(saved))(base(saved).config.__class__(n_layer=1, n_embd=8, n_head=2)).requires_grad_(False)
    assert len(state_of(fresh, Frozen(fresh)).tensors) > 10


def test_a_checkpoint_that_has_all_of_them_is_loaded(saved: Path) -> None:
    """As releases before this one have saved it."""
    model = lora(saved)
    state = collect(model, [], {})
    again = lora(saved, seed=1)
    frozen = Frozen(again)
    apply(again, [], state.tensors, state.plain)
    assert all("lora_" in name for name in state_of(again, frozen).tensors)


def test_a_lora_run_resumes_exactly_and_saves_what_it_unfreezes(saved: Path, tmp_path: Path) -> None:
    tokens = torch.randint(0, 32, (12, 8), generator=torch.Generator().manual_seed(1))

    def script(run: SpotRun, strike: Callable[[], None]) -> None:
        model = lora(saved)
        norm = next(module for name, module in model.named_modules() if name.endswith("ln_f"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        run.register(model=model, optimizer=optimizer)
        for ids in run.steps(DataLoader(tokens, batch_size=4, shuffle=True), until=9):
            strike()
            norm.requires_grad_(run.step >= 4)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss)
        run.finish()

    whole = Attempts(tmp_path / "whole").all(script).result
    struck = Attempts(tmp_path / "struck").all(script, [2, 5, 8])
    assert struck.result == whole
    newest = RunPaths(struck.folder).checkpoint(list_checkpoints(RunPaths(struck.folder))[0])
    tensors = b"".join(path.read_bytes() for path in newest.glob("*.safetensors"))
    assert b"ln_f.weight" in tensors
    assert b"wte.weight" not in tensors


def test_a_module_that_is_registered_later_leaves_the_bases_of_earlier_ones_as_they_began(saved: Path) -> None:
    whole = nn.Module()
    whole.teacher = base(saved).requires_grad_(False)
    first = Frozen(whole)
    with torch.no_grad():  # A restore: the teacher had followed its student.
        whole.teacher.transformer.ln_f.weight += 1
    whole.student = base(saved).requires_grad_(False)
    both = Frozen(whole, first)
    named = dict(whole.named_parameters())
    changed = "teacher.transformer.ln_f.weight"
    assert changed not in both.left_out(named)
    assert both.left_out(named) >= {name for name in named if name != changed and "lm_head" not in name}
