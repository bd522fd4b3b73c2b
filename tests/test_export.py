"""The exported model: what is in it, what it needs of the local disk, and what is refused in a line."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trainer.attempt.history import no_progress
from trainer.attempt.record import open_attempt, record
from trainer.errors import AttemptError, RunError, TrainerError
from trainer.finetune import model
from trainer.finetune.config import TrainConfig, parse
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import MANIFEST, CheckpointName, RunPaths
from trainer.machine import scratch
from trainer.machine.scratch import ScratchError
from trainer.training import export

LAST = CheckpointName.parse("0000000002-a0001-0000ff-1")


class Scaled(nn.Linear):
    """Keeps what is no parameter: a tensor, or a plain value."""

    def __init__(self, scale: object) -> None:
        super().__init__(2, 2)
        self.scale = scale

    def get_extra_state(self) -> object:
        return self.scale

    def set_extra_state(self, state: object) -> None:
        self.scale = state


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture
def full(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, on a disk that has room for a few bytes a file, and none left once it has refused some."""
    write, statvfs = os.write, os.statvfs

    def refuse(descriptor: int, data: Any) -> int:
        if len(data) > 50 and Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(temporary):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    def room(path: Any) -> Any:
        if not Path(path).is_relative_to(temporary):
            return statvfs(path)
        free = 0 if any(temporary.rglob("model.bin")) else 1 << 40
        return SimpleNamespace(f_bavail=free, f_frsize=1, f_favail=1, f_files=1)

    monkeypatch.setattr(os, "write", refuse)
    monkeypatch.setattr(os, "statvfs", room)
    return temporary


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    """What the export needs of an attempt, in a run with one checkpoint."""
    paths = RunPaths(tmp_path / "run")
    folder = paths.checkpoint(LAST)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(Manifest("checkpoint", {}, {"step": 2, "run_id": "r"}).to_json())
    return SimpleNamespace(paths=paths, attempt=None, notices=SimpleNamespace(first=lambda: None))


def exported(run: Any, module: nn.Module, save: Callable[..., None] = export.save_tensors) -> dict[str, torch.Tensor]:
    """The tensors of `final/` by name."""
    from safetensors.torch import load_file

    export.export(run, module, save, LAST)
    assert {path.name for path in run.paths.final.iterdir()} - {MANIFEST} == set(read_manifest(run.paths.final).files)
    found: dict[str, torch.Tensor] = {}
    for path in run.paths.final.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_extra_state_of_modules_is_exported_where_it_is_a_tensor(run: Any, capsys: pytest.CaptureFixture) -> None:
    tensors = exported(run, nn.Sequential(Scaled(torch.ones(3)), Scaled({"scale": 2.0})))
    assert sorted(tensors) == ["0._extra_state", "0.bias", "0.weight", "1.bias", "1.weight"]
    assert "Not exported, because a safetensors file holds tensors only: 1._extra_state" in capsys.readouterr().out


def test_weights_are_streamed_and_need_no_room_on_the_local_disk(run: Any, full: Path) -> None:
    module = nn.Linear(3, 2)
    assert torch.equal(exported(run, module)["weight"], module.weight)
    assert list(full.iterdir()) == []


def save_whole(module: nn.Module, folder: Path) -> None:
    descriptor = os.open(folder / "model.bin", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(descriptor, b"0" * 100)
    finally:
        os.close(descriptor)


def save_by_library(module: nn.Module, folder: Path) -> None:
    try:
        save_whole(module, folder)
    except OSError:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)") from None


@pytest.mark.parametrize("save", [save_whole, save_by_library])
def test_a_full_local_disk_is_named_and_left_to_the_next_machine(
    run: Any, full: Path, save: Callable[..., None]
) -> None:
    with pytest.raises(Exception, match="No space left on device") as raised:
        export.export(run, nn.Linear(3, 2), save, LAST)
    assert isinstance(raised.value, TrainerError)
    assert raised.value.code == EXIT_PREEMPTED
    assert str(full) in str(raised.value)
    assert str(run.paths.root) not in str(raised.value)
    assert f"Checkpoint {LAST} is whole; the next attempt exports it" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert list(full.iterdir()) == []


def fails_elsewhere(module: nn.Module, folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/of the user/model.bin")


def fails_in_the_cache(module: nn.Module, folder: Path) -> None:
    raise scratch.full(Path("/elsewhere/of the user"))


@pytest.mark.parametrize("save", [fails_elsewhere, fails_in_the_cache])
def test_a_full_disk_that_an_error_names_is_the_one_that_is_blamed(
    run: Any, temporary: Path, save: Callable[..., None]
) -> None:
    with pytest.raises(ScratchError, match="could not be exported: /elsewhere/of the user: No space left") as raised:
        export.export(run, nn.Linear(3, 2), save, LAST)
    assert str(temporary) not in str(raised.value)


def test_an_error_whose_text_names_a_full_disk_is_the_scripts_own_where_none_is(run: Any, temporary: Path) -> None:
    def save(module: nn.Module, folder: Path) -> None:
        raise RuntimeError("upload: the server said: No space left on device")

    with pytest.raises(RuntimeError, match="the server said"):
        export.export(run, nn.Linear(3, 2), save, LAST)


def test_disks_that_are_full_on_each_machine_end_the_run_for_good(run: Any, full: Path) -> None:
    for _ in range(3):
        attempt_ = open_attempt(run.paths, launch="l", config={}, binding={}, newest_step=2)
        assert no_progress(attempt_, 2) is None
        record(attempt_, "restored", step=2)
        with pytest.raises(ScratchError) as raised:
            export.export(run, nn.Linear(3, 2), save_whole, LAST)
        record(attempt_, "end", code=raised.value.code, cause="error", error=str(raised.value))
    stuck = no_progress(open_attempt(run.paths, launch="l", config={}, binding={}), 2)
    assert stuck
    assert "3 attempts in a row" in stuck
    assert "No space left on device" in stuck


def test_a_model_goes_where_there_is_room(
    run: Any, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        found = real(path)
        room = 1 << 40 if Path(path).is_relative_to(home) else 1 << 10
        return SimpleNamespace(f_bavail=room, f_frsize=1, f_favail=1, f_files=found.f_files)

    monkeypatch.setattr(os, "statvfs", statvfs)
    seen = []
    exported(run, nn.Linear(3, 2), lambda module, folder: seen.append(folder))
    assert seen[0].is_relative_to(home)


@pytest.mark.parametrize(
    ("name", "said"), [(MANIFEST, "a name reserved by the trainer"), ("a\nb", "cannot name a file in the bucket")]
)
def test_a_file_that_cannot_be_in_the_export_is_refused_in_a_line(
    run: Any, temporary: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setattr("trainer.bucket.retry.START_RETRY_S", 2.0)
    begun = threading.Event()

    def save(module: nn.Module, folder: Path) -> None:
        begun.set()
        (folder / name).write_text("{}")

    with pytest.raises(AttemptError, match=said) as raised:
        export.export(run, nn.Linear(3, 2), save, LAST)
    assert begun.is_set()
    assert raised.value.code == EXIT_FAILED
    assert len(str(raised.value).splitlines()) == 1
    assert not (run.paths.final / MANIFEST).exists()


def test_a_save_model_that_cannot_be_called_is_refused_before_training() -> None:
    export.check_save_model(export.save_tensors)
    export.check_save_model(lambda module, folder: None)
    export.check_save_model(lambda module, folder, write: None)
    export.check_save_model(print)
    with pytest.raises(RunError, match=r"must accept save_model\(model, folder\)"):
        export.check_save_model(lambda module: None)


def test_a_compiled_model_is_exported_under_its_own_names(run: Any) -> None:
    class Wrapped(nn.Module):  # As torch.compile wraps a module, without its second of imports.
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    body = nn.Sequential(Wrapped(nn.Linear(2, 2)), nn.Linear(2, 2))
    compiled = Wrapped(body)
    assert sorted(exported(run, compiled)) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    seen: list[str] = []
    exported(run, compiled, lambda module, folder: seen.extend(module.state_dict()))
    assert sorted(seen) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert isinstance(body[0], Wrapped)


# -- models of transformers --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and its tokenizer, as `save_pretrained` leaves them; the weights in several files."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1, "to": 2, "be": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path / "m")
    small = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "m", max_shard_size="4KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    return tmp_path / "m"


def config(folder: Path) -> TrainConfig:
    return parse(["--checkpoint-dir", "/nowhere", "--cpu", "--model", str(folder), "--data", "stdlib"])


def test_a_model_of_the_hub_is_exported_as_it_was_but_for_its_weights(run: Any, folder: Path, full: Path) -> None:
    from transformers import AutoModelForCausalLM

    chosen = config(folder)
    module = model.build_model(chosen, 4)
    assert module.config.use_cache is False  # type: ignore[union-attr]
    with torch.no_grad():
        module.model.norm.weight.fill_(3.0)  # type: ignore[union-attr, operator]

    def save(module: nn.Module, path: Path, write: Any) -> None:
        model.save_model(module, chosen, path, write)
        assert not list(path.glob("*.safetensors"))

    exported(run, module, save)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, run.paths.final))
    assert before == after
    assert after["use_cache"] is True
    assert json.loads((run.paths.final / "generation_config.json").read_text()) == json.loads(
        (folder / "generation_config.json").read_text()
    )
    again = AutoModelForCausalLM.from_pretrained(run.paths.final)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in again.state_dict().items())
    assert (run.paths.final / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-*.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("left", [0, 40])
def test_a_models_file_that_was_cut_is_said_in_a_line(folder: Path, name: str, left: int) -> None:
    [path] = folder.glob(name)
    os.truncate(path, left)
    with pytest.raises(model.ModelError, match=f"--model {folder}: ") as refused:
        model.build_model(config(folder), 4)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("left", [0, 40])
def test_a_tokenizers_file_that_was_cut_is_said_in_a_line(folder: Path, left: int) -> None:
    os.truncate(folder / "tokenizer.json", left)
    with pytest.raises(model.ModelError, match=f"--model {folder}: its tokenizer: ") as refused:
        model.load_tokenizer(config(folder))
    assert len(str(refused.value).splitlines()) == 1
