"""States that are unusual and not wrong: each comes back as it was, or is refused in a line before it could be lost."""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import one_rank
import pytest
import torch
from support import event
from torch import nn

from trainer.checkpoint import memory_formats, optimizers, restore, state, writing
from trainer.checkpoint.shards import deal, local, parts_of
from trainer.checkpoint.state import StateError
from trainer.checkpoint.values import decode
from trainer.layout.events import event_named, read_events
from trainer.layout.manifest import Manifest
from trainer.layout.names import STATE, RunPaths, list_attempts, list_checkpoints

NAME = "0000000002-a0001-0000ff-1"


def saved(folder: Path, live: state.State) -> Path:
    """A committed checkpoint."""
    folder.mkdir(parents=True)
    [share] = deal(parts_of(live.tensors, 1, live.buffers), 1)
    path = folder / writing.share_name(0)
    record = writing.write_share(path, share, lambda part: local(live.tensors[part.name]).contiguous())
    files = {path.name: record, STATE: writing.write_state(folder, live.plain)}
    writing.write_manifest(folder, Manifest("checkpoint", files, {"step": 2}))
    return folder


def resume(
    folder: Path, old: nn.Module, optimizer: Any, new: nn.Module, other: Any, **made: Any
) -> tuple[list[str], dict[str, Any]]:
    """Save one model and its optimizer, and load that into another; (names of the saved tensors, the plain values)."""
    collected = state.collect(old, [optimizer] if optimizer else [], {"step": 2}, **made)
    loaded = restore.load(saved(folder / NAME, collected), state.collect(new, [other] if other else [], {}, **made))
    state.apply(new, [other] if other else [], loaded.tensors, loaded.plain, **made)
    return sorted(collected.tensors), loaded.plain


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    """One step of training on numbers of its own."""
    torch.manual_seed(number)
    first = next(model.parameters())
    shape = (2, first.shape[1], 8, 8) if first.dim() == 4 else (2, first.shape[-1])
    model(torch.randn(shape)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# -- memory formats ----------------------------------------------------------------------------------------------------


def convolution() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def transposed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    model.weight = nn.Parameter(torch.randn(5, 3).t())
    return model


FUSED = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("made", [convolution, transposed])
@pytest.mark.parametrize("kind", FUSED)
def test_tensors_that_do_not_lie_in_rows_resume_bit_for_bit_with_a_fused_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, made: Callable[[], nn.Module], older: bool
) -> None:
    if older:  # A checkpoint of a release that recorded no strides.
        real = writing.write_state
        kept = ("optim", "counters", "extra")
        monkeypatch.setattr(
            writing, "write_state", lambda folder, plain: real(folder, {key: plain[key] for key in kept})
        )
    (model, again), optimizer = (made(), made()), FUSED[kind]
    one, other = optimizer(model.parameters()), optimizer(again.parameters())
    for number in range(2):
        step(model, one, number)
    resume(tmp_path, model, one, again, other)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert mine.stride() == theirs.stride()
        for key, value in one.state[mine].items():
            assert other.state[theirs][key].stride() == value.stride(), key
    for number in range(2, 5):
        step(model, one, number)
        step(again, other, number)
        assert same(model, again)


def test_a_parameter_comes_back_in_the_format_that_it_was_saved_in(tmp_path: Path) -> None:
    model, again = convolution(), convolution().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.register_buffer("table", torch.arange(6.0).reshape(2, 3).t())
    again.register_buffer("table", torch.zeros(3, 2))
    held = next(again.parameters())
    resume(tmp_path, model, None, again, None)
    assert next(again.parameters()) is held
    assert held.stride() == next(model.parameters()).stride() != again[0].weight.contiguous().stride()
    assert again.table.stride() == (1, 3)  # type: ignore[operator]
    assert torch.equal(again.table, model.table)  # type: ignore[arg-type]


@pytest.mark.parametrize("strides", [[1, 1 << 60], [2, 1], [0, 0], "ab", None, [1], [1.0, 2.0], [-1, 3]])
def test_strides_that_no_tensor_was_saved_with_are_ignored(tmp_path: Path, strides: object) -> None:
    model, again = nn.Linear(2, 3), nn.Linear(2, 3)
    live = state.collect(model, [], {})
    live.plain["strides"]["model.weight"] = strides
    loaded = restore.load(saved(tmp_path / NAME, live), state.collect(again, [], {}))
    state.apply(again, [], loaded.tensors, loaded.plain)
    assert same(model, again)


# -- extra state of modules --------------------------------------------------------------------------------------------


class Counting(nn.Linear):
    def __init__(self, value: object = 0) -> None:
        super().__init__(2, 2)
        self.value = value

    def get_extra_state(self) -> object:
        return self.value

    def set_extra_state(self, value: object) -> None:
        self.value = value


@pytest.mark.parametrize("value", [7, {"amax": [1.5, None]}, b"\x00\xff", b""])
def test_what_modules_keep_besides_comes_back(tmp_path: Path, value: object) -> None:
    model, again = nn.Sequential(Counting(value), Counting(torch.ones(3))), nn.Sequential(Counting(), Counting())
    names, _ = resume(tmp_path, model, None, again, None)
    assert again[0].value == value
    assert torch.equal(again[1].value, torch.ones(3))
    assert "module.1" in names


@pytest.mark.parametrize(("content", "position"), [(b"\x00fp8\xff", 5), (b"", 0), (b"ab", 0), (bytes(300_000), 9)])
def test_a_file_in_memory_comes_back_with_its_position(tmp_path: Path, content: bytes, position: int) -> None:
    file = io.BytesIO(content)
    file.seek(position)
    model, again = nn.Sequential(Counting({"state": file})), nn.Sequential(Counting())
    resume(tmp_path, model, None, again, None)
    found = again[0].value["state"]
    assert type(found) is io.BytesIO
    assert (found.getvalue(), found.tell()) == (content, position)
    assert file.tell() == position, "the module's own file is as it was"


@pytest.mark.parametrize("held", [["x", 0], [{"bytes": "t"}, -1], [{"bytes": "t"}, True], [{"bytes": "t"}], "x", []])
def test_a_file_in_memory_that_was_not_saved_so_is_refused(held: object) -> None:
    with pytest.raises(StateError, match=r"state\.json holds a"):
        decode({"file": held}, {"t": torch.zeros(2, dtype=torch.uint8)})


class Scaled(nn.Linear):
    """As a layer of an fp8 engine: its scale comes from the greatest inputs so far; it keeps them in a file."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.greatest = torch.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.greatest = torch.cat([self.greatest[1:], x.detach().abs().max()[None]])
        return super().forward(x / (1 + self.greatest.sum()))

    def get_extra_state(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save({"greatest": self.greatest}, file)
        return file

    def set_extra_state(self, file: io.BytesIO) -> None:
        file.seek(0)
        self.greatest = torch.load(file)["greatest"]


def test_a_module_that_keeps_its_state_in_a_file_resumes_exactly(tmp_path: Path) -> None:
    def lost(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if len(steps := [*passes, None]) > 9:
            raise RuntimeError("lost")
        passes[:] = steps
        return one_rank.squares(model, batch)

    passes: list[None] = []
    assert one_rank.train(tmp_path / "whole", model=Scaled).code == 0
    assert one_rank.train(tmp_path / "run", model=Scaled, loss=lost).code == 1
    assert one_rank.train(tmp_path / "run", model=Scaled).code == 0
    whole, run = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert run == whole
    last = [max((tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "run")]
    shares = [(folder / "share-00000.safetensors") for folder in last]
    assert shares[0].read_bytes() == shares[1].read_bytes()


def test_what_modules_keep_and_cannot_be_saved_or_restored_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"module\.0: a object cannot be saved"):
        state.collect(nn.Sequential(Counting(object())), [], {})
    model = nn.Sequential(Counting(), nn.Linear(2, 2))
    with pytest.raises(StateError, match=r"model\.1: its extra state \(get_extra_state\) is not in the checkpoint"):
        resume(tmp_path, model, None, nn.Sequential(Counting(), Counting()), None)

    class Mute(nn.Linear):
        def get_extra_state(self) -> int:
            return 1

    with pytest.raises(StateError, match=r"model\.0 has get_extra_state and no set_extra_state"):
        resume(tmp_path / "b", nn.Sequential(Mute(2, 2)), None, nn.Sequential(Mute(2, 2)), None)


def test_a_checkpoint_of_a_release_that_did_not_save_it_is_taken(tmp_path: Path) -> None:
    live = state.collect(Counting(5), [], {})
    live.plain.pop("modules")
    again = Counting(0)
    loaded = restore.load(saved(tmp_path / NAME, live), state.collect(again, [], {}))
    state.apply(again, [], loaded.tensors, loaded.plain)
    assert again.value == 0


def test_what_a_model_tells_besides_its_parameters_and_buffers_is_named() -> None:
    class Scaled(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}scale"] = torch.ones(3)
            destination[f"{prefix}same"] = self.weight  # Another name for what is saved.

    model = nn.Sequential(Scaled(2, 2), Counting(3), nn.BatchNorm1d(2))
    assert state.not_seen(model) == ["0.scale"]


def test_ranks_whose_buffers_differ_in_form_are_told_so_in_a_line() -> None:
    from types import SimpleNamespace

    from trainer.training.evaluation import refuse_unlike_buffers

    model = Growing(1)
    rows: list[list[int]] = []

    def exchange(row: list[int]) -> Any:
        rows.append(row)
        return SimpleNamespace(wait=lambda: list(rows))

    group: Any = SimpleNamespace(exchange=exchange)
    refuse_unlike_buffers(group, model)
    model(torch.randn(1, 2))
    with pytest.raises(StateError, match="the ranks' buffers differ"):
        refuse_unlike_buffers(group, model)


# -- buffers -----------------------------------------------------------------------------------------------------------


class Growing(nn.Module):
    """A buffer that grows, one that comes, one that goes, one that is registered late; a cache that is not saved."""

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("queue", torch.zeros(size, 2))
        self.register_buffer("mask", None)
        self.register_buffer("start", torch.ones(1))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.queue = torch.cat([self.queue, x.detach()])
        self.mask = torch.ones(3)
        self.start = None
        self.cache = torch.ones(len(self.queue))
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros((), dtype=torch.int64))
        self.late += 1
        return x * self.weight


def named(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.named_buffers()}


def test_buffers_that_change_their_form_come_back(tmp_path: Path) -> None:
    from trainer.checkpoint import buffers

    model, again = Growing(), Growing()
    made = buffers.forms(model)
    for _ in range(3):
        model(torch.randn(1, 2))
    held = again.queue
    names, _ = resume(tmp_path, model, None, again, None, made=made)
    assert names == ["model.late", "model.mask", "model.queue", "model.weight"]
    assert named(again) == {"queue": [3, 2], "mask": [3], "cache": [2], "late": []}
    assert again.start is None
    assert again.queue is held
    for name in ("queue", "mask", "late"):
        assert torch.equal(getattr(again, name), getattr(model, name)), name


def test_buffers_that_the_program_makes_otherwise_than_before_are_refused(tmp_path: Path) -> None:
    from trainer.checkpoint import buffers

    def refused(folder: str, old: nn.Module, new: nn.Module) -> str:
        live = state.collect(old, [], {}, made=buffers.forms(old))
        loaded = restore.load(saved(tmp_path / folder / NAME, live), state.collect(new, [], {}))
        with pytest.raises(StateError) as raised:
            state.apply(new, [], loaded.tensors, loaded.plain, made=buffers.forms(new))
        return str(raised.value)

    said = refused("a", Growing(4), Growing(8))
    assert said == "model.queue is (4, 2) torch.float32 in the checkpoint, (8, 2) torch.float32 in the model"
    assert refused("b", nn.BatchNorm1d(2), nn.GroupNorm(2, 2)) == "model.num_batches_tracked is not in the model"
    assert refused("c", nn.GroupNorm(2, 2), nn.BatchNorm1d(2)) == "model.num_batches_tracked is not in the checkpoint"


def test_buffers_are_set_aside_and_put_back_whatever_happens_to_them() -> None:
    from trainer.checkpoint import buffers

    model = Growing(1)
    kept = buffers.keep(model)
    before = named(model)
    model(torch.randn(1, 2))
    del model.start
    buffers.put_back(model, kept)
    assert {name: shape for name, shape in named(model).items() if name != "late"} == before
    assert model.mask is None
    assert torch.equal(model.queue, torch.zeros(1, 2))
    model.queue.add_(1)
    assert torch.equal(kept["queue"], torch.zeros(1, 2))  # type: ignore[arg-type]
    wide = nn.Module()
    wide.register_buffer("same", torch.ones(1).expand(3))
    kept = buffers.keep(wide)
    wide.same = torch.zeros(1).expand(3)
    buffers.put_back(wide, kept)
    assert wide.same.tolist() == [1, 1, 1]


def test_a_buffer_that_is_not_persistent_is_not_saved_and_one_of_an_older_release_is_ignored(tmp_path: Path) -> None:
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    old.register_buffer("positions", torch.zeros(8))  # As an older release saved it, after it had grown.
    new.register_buffer("positions", torch.ones(4), persistent=False)
    assert "model.positions" not in state.collect(new, [], {}).tensors
    resume(tmp_path, old, None, new, None)
    assert new.positions.tolist() == [1] * 4
    assert same(old, new)


def test_a_buffer_that_steps_change_and_nothing_saves_is_named() -> None:
    from trainer.checkpoint import buffers

    model = nn.Module()
    for name in ("average", "table", "unset"):
        model.register_buffer(name, torch.full((2,), float("nan")), persistent=False)
    before = buffers.keep(model)
    model.average.fill_(1)
    model.table = torch.zeros(5)  # A table that is made anew for longer samples.
    assert buffers.not_kept(before, buffers.keep(model), model) == ["average"]


# -- names -------------------------------------------------------------------------------------------------------------


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Counting2(4, 3))


class Counting2(nn.Linear):
    count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, count: int) -> None:
        self.count = count


def whole(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def part(model: nn.Sequential) -> nn.Module:
    model[0] = torch.compile(model[0], backend="eager")
    model[2] = torch.compile(model[2], backend="eager")
    return model


def distributed(model: nn.Sequential) -> nn.Module:
    outer = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(outer)
    outer.module = whole(model)
    return outer


def compiled_last(model: nn.Sequential) -> nn.Module:
    return torch.compile(distributed(model), backend="eager")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("before", "after"), [(whole, None), (None, whole), (part, None), (None, distributed), (part, compiled_last)]
)
def test_a_model_may_be_compiled_in_one_attempt_and_not_in_the_next(
    tmp_path: Path, before: Callable[..., nn.Module] | None, after: Callable[..., nn.Module] | None
) -> None:
    plain, other = body(), body()
    one = torch.optim.AdamW(plain.parameters(), lr=0.1)
    step(plain, one, 1)
    model = before(plain) if before else plain
    again = after(other) if after else other
    two = torch.optim.AdamW(again.parameters(), lr=0.1)
    names, _ = resume(tmp_path, model, one, again, two)
    assert [name for name in names if "_orig_mod" in name] == []
    assert {"model.0.weight", "model.1.running_mean", "optim.0.2.bias.exp_avg"} <= set(names)
    assert same(plain, other)
    assert torch.equal(plain[1].running_mean, other[1].running_mean)
    for mine, theirs in zip(one.state.values(), two.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_checkpoint_of_a_compiled_model_by_an_older_release_is_taken(tmp_path: Path) -> None:
    model, again = body(), body()
    one, two = (torch.optim.AdamW(of.parameters(), lr=0.1) for of in (model, again))
    step(model, one, 1)
    live = state.collect(model, [one], {})
    older = {
        name.replace("model.", "model._orig_mod.").replace("optim.0.", "optim.0._orig_mod."): tensor
        for name, tensor in live.tensors.items()
    }
    live = state.State(dict(sorted(older.items())), {**live.plain, "strides": {}}, frozenset(), frozenset())
    loaded = restore.load(saved(tmp_path / NAME, live), state.collect(again, [two], {}))
    state.apply(again, [two], loaded.tensors, loaded.plain)
    assert same(model, again)
    assert len(two.state) == 6


# -- optimizers --------------------------------------------------------------------------------------------------------


class Keeps(torch.optim.SGD):
    """Keeps state under keys of all kinds."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                values = self.state[parameter]
                for key in ("a.b", 0, "0", ("a", 1), "plain"):
                    values[key] = torch.full_like(parameter, 1.0 + len(str(key)))
                values["a.number"] = 3
        self.state["of all"] = {"total": torch.tensor(4.0), 7: [1, torch.ones(2)]}
        self.state[3] = torch.ones(1)


def test_an_optimizers_state_under_keys_of_any_kind_comes_back(tmp_path: Path) -> None:
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    one, two = Keeps(model.parameters(), lr=0.1, momentum=0.9), Keeps(again.parameters(), lr=0.1, momentum=0.9)
    step(model, one, 1)
    resume(tmp_path, model, one, again, two)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert two.state[theirs].keys() == one.state[mine].keys()
        for key, value in one.state[mine].items():
            assert torch.equal(torch.as_tensor(two.state[theirs][key]), torch.as_tensor(value)), key
    assert two.state["of all"]["total"] == 4
    assert two.state["of all"][7][1].tolist() == [1, 1]
    assert two.state[3].tolist() == [1]


def test_a_dotted_key_that_an_older_release_saved_comes_back(tmp_path: Path) -> None:
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    one, two = (torch.optim.SGD(of.parameters(), lr=0.1) for of in (model, again))
    live = state.collect(model, [one], {})
    tensors = dict(sorted({**live.tensors, "optim.0.weight.slow.buffer": torch.ones(2, 3)}.items()))
    live = state.State(tensors, live.plain, frozenset(), frozenset())
    loaded = restore.load(saved(tmp_path / NAME, live), state.collect(again, [two], {}))
    state.apply(again, [two], loaded.tensors, loaded.plain)
    assert torch.equal(two.state[again.weight]["slow.buffer"], torch.ones(2, 3))


class Lookahead(torch.optim.Optimizer):
    """Slow weights beside an optimizer's state, in a state_dict whose keys are the parameters themselves."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.count = base, 0
        self.state = defaultdict(dict)
        self._optimizer_state_dict_post_hooks = {}  # type: ignore[assignment]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self) -> None:  # type: ignore[override]
        self.base.step()
        self.count += 1
        for parameter in self.base.param_groups[0]["params"]:
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            if self.count % 2 == 0:
                slow.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "slow": dict(self.state), "count": self.count}

    def load_state_dict(self, told: dict[str, Any]) -> None:
        self.base.load_state_dict(told["base"])
        self.state, self.count = defaultdict(dict, told["slow"]), told["count"]


class Outside:
    """A wrapper that is no Optimizer at all, as schedule-free optimizers have one; what it keeps is its base's."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.k = base, 0

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self) -> None:
        self.base.step()
        self.k += 1
        for parameter in self.base.param_groups[0]["params"]:
            parameter.data.mul_(1 - 0.1 / self.k)

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "k": self.k}

    def load_state_dict(self, told: dict[str, Any]) -> None:
        self.base.load_state_dict(told["base"])
        self.k = told["k"]


@pytest.mark.parametrize("wrapper", [Lookahead, Outside])
def test_what_an_optimizers_own_state_dict_says_comes_back(tmp_path: Path, wrapper: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    one, two = (wrapper(torch.optim.AdamW(of.parameters(), lr=0.1)) for of in (model, again))
    for number in range(3):
        step(model, one, number)
    resume(tmp_path, model, one, again, two)
    for number in range(3, 8):
        step(model, one, number)
        step(again, two, number)
        assert same(model, again), number


def test_what_would_be_lost_of_an_optimizer_is_refused_before_the_first_step() -> None:
    model = nn.Linear(3, 2)

    class Mute(Lookahead):
        state_dict = torch.optim.Optimizer.state_dict  # type: ignore[assignment]

    class ByAddress(Lookahead):
        def state_dict(self) -> dict[str, Any]:
            told = super().state_dict()
            return {**told, "slow": {id(key): value for key, value in told["slow"].items()}}

    mute, by_address = Mute(torch.optim.SGD(model.parameters())), ByAddress(torch.optim.SGD(model.parameters()))
    with pytest.raises(StateError, match=r"optimizer 0 \(Mute\) keeps another optimizer in \.base, and its state_dict"):
        state.collect(model, [mute], {})
    inner = torch.optim.SGD(model.parameters())
    for several in ([inner], (inner,), {"of all": inner}):
        outer = torch.optim.SGD(model.parameters())
        outer.inner = several  # type: ignore[attr-defined]
        with pytest.raises(StateError, match=r"optimizer 0 \(SGD\) keeps another optimizer in \.inner, and its"):
            state.collect(model, [outer], {})
    step(model, by_address, 1)
    with pytest.raises(StateError, match=r"optimizer 0 \(ByAddress\): state_dict\(\) names parameters by id\(\)"):
        state.collect(model, [by_address], {})
    stray = torch.optim.SGD(model.parameters())
    stray.state[torch.ones(3)]["slow"] = torch.ones(3)
    with pytest.raises(StateError, match=r"optimizer 0 \(SGD\) holds a parameter that the model does not have, \(3,\)"):
        state.collect(model, [stray], {})
    stray = torch.optim.SGD(model.parameters())
    stray.state["seen"] = object()
    with pytest.raises(StateError, match="a object cannot be saved"):
        state.collect(model, [stray], {})


class Four(nn.Linear):
    """A model for `one_rank`, whose extra state is given."""

    def __init__(self, value: object = None) -> None:
        super().__init__(4, 1)
        self.value = value

    def get_extra_state(self) -> object:
        return self.value

    def set_extra_state(self, value: object) -> None:
        self.value = value


def with_a_complex_buffer() -> nn.Module:
    model = nn.Linear(4, 1)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    return model


class Beside:
    """An optimizer of its own name whose state_dict leaves another one out."""

    def __new__(cls, parameters: Any) -> Any:
        outer = torch.optim.SGD(parameters, lr=0.01)
        outer.inner = torch.optim.AdamW(outer.param_groups[0]["params"])  # type: ignore[attr-defined]
        return outer


class Seen:
    def state_dict(self) -> dict[str, Any]:
        return {"seen": object()}

    def load_state_dict(self, told: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": lambda: Four(object())}, "module.: a object cannot be saved"),
        ({"model": with_a_complex_buffer}, "model.phase: torch.complex64 cannot be saved"),
        ({"optimizer": Beside}, "optimizer 0 (SGD) keeps another optimizer in .inner, and its state_dict"),
        ({"extra": {"tally": Seen()}}, "extra.tally.seen: a object cannot be saved"),
    ],
    ids=["extra state", "buffer", "optimizer", "extra"],
)
def test_a_run_whose_state_cannot_be_saved_ends_before_its_first_step(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    run_dir = tmp_path / "run"
    left = one_rank.train(run_dir, **options)
    assert left.code == 1
    assert said in str(left.error)
    assert event(run_dir, "end")["step"] == 0
    [attempt] = list_attempts(RunPaths(run_dir))
    assert event_named(read_events(RunPaths(run_dir), attempt, ("first-step",)), "first-step") is None
    assert list_checkpoints(RunPaths(run_dir)) == []


# -- through the launcher ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_state_is_unusual_resumes_bit_for_bit(tmp_path: Path) -> None:
    from support import PROGRAMS, launch, losses, weights

    def attempt(folder: str, *args: object) -> tuple[int, str]:
        ended = launch(PROGRAMS / "odd_model.py", "--dir", tmp_path / folder, *args, processes=2)
        return ended.code, ended.output

    code, said = attempt("whole")
    assert code == 0, said
    assert "Not exported, because a safetensors file holds tensors only: _extra_state" in said
    assert attempt("taken", "--taken-at", 3)[0] == 75
    code, said = attempt("taken")
    assert code == 0, said
    assert "resumed at step" in said
    assert "is not persistent" not in said
    assert losses(tmp_path / "taken") == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 9))
    assert weights(tmp_path / "taken") == weights(tmp_path / "whole") != {}


# -- the work of a restore ---------------------------------------------------------------------------------------------


class Counted(Mapping[str, torch.Tensor]):
    """Tensors by name; counts how often a name is looked at."""

    looks = 0

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        Counted.looks += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        for name in self.tensors:
            Counted.looks += 1
            yield name

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts after the layout, too, which makes a dictionary of its own."""
    real = memory_formats.laid_out
    monkeypatch.setattr(memory_formats, "laid_out", lambda tensors, strides: Counted(real(tensors, strides)))


def looks(count: int) -> int:
    """How often a restore of so many parameters looks at a tensor's name."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.ones(1)
    live = state.collect(model, [optimizer], {})
    plain: Mapping[str, Any] = json.loads(json.dumps(live.plain))
    Counted.looks = 0
    state.apply(model, [optimizer], Counted(live.tensors), plain)
    return Counted.looks


@pytest.mark.usefixtures("counted")
def test_the_work_of_a_restore_grows_as_the_number_of_parameters() -> None:
    assert looks(400) < 2.2 * looks(200)


@pytest.mark.usefixtures("counted")
def test_a_restore_that_looks_at_all_tensors_for_each_parameter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = optimizers.by_parameter

    def quadratic(tensors: Mapping[str, torch.Tensor], named: Mapping[str, nn.Parameter], others: Any) -> Any:
        for _ in named:
            list(tensors)
        return real(tensors, named, others)

    monkeypatch.setattr(optimizers, "by_parameter", quadratic)
    assert looks(400) > 3 * looks(200)
